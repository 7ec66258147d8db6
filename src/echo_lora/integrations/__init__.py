"""Plug-ins for other training programs. Each module imports its program, and is imported by that program alone.

axolotl          the plug-in of Axolotl: its settings, and what it refuses
axolotl_trainer  Axolotl's trainer with the echo
ms_swift         a tuner of ms-swift, and the optimizer that goes with it
"""
