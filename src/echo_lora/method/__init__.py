"""Echo-LoRA itself, in reading order. Equation numbers are those of `docs/method.md`.

    | what                                                       | where                                      |
    |------------------------------------------------------------|--------------------------------------------|
    | all of it in one place, in order                           | step.training_step                         |
    | β      boundary: last token before the first answer token  | alignment.boundary_positions               |
    | 1      h^s, source states at β, in the echo-off pass       | step.reading                               |
    |        stopgrad(h^s)                                       | step.reading, `detach`                     |
    | 2      z = norm(mean of stopgrad(h^s))                     | echo.echo_representation                   |
    |        norm: LayerNorm, or `standardize`                   | echo.Standardize                           |
    |        controls in place of z (zero, noise, shuffled)      | echo.apply_control                         |
    | 3      e = W2 tanh(W1 z), g = sigmoid(U2 tanh(U1 z) + c),  | echo.projection_and_gate                   |
    |        δ_m = λ_m · (g ⊙ e)                                 |                                            |
    | 4      injection of a_t δ_m at module m                    | injection.Injector, its hooks; `_add`      |
    |        a_t, the positions that receive δ                   | alignment.injection_mask                   |
    | 5      r_k ~ Bernoulli(p_k), whether step k is routed      | routing.is_routed, routing_probability     |
    |        asked once a step; r_k = 0 is a plain LoRA step     | model.EchoModel.forward                    |
    | 6      echo-on pass, on the shared prefix                  | step.training_step, prefix.PrefixRecorder  |
    | 7      CE(off) + r_k·(CE(on) + μ_k·distillation)           | losses.terms_and_gradient                  |
    |        distillation = τ² · KL(teacher ‖ student); by       | losses.distillation                        |
    |        default the echo-on pass teaches the echo-off pass  | losses.terms_and_gradient, `teacher`       |
    |        its mask, and that of both CEs: answer positions    | step._loss_sums, `is_answer`               |
    |        μ_k, the weight of the distillation at step k       | routing.distillation_weight                |
    |        w · (all that) + CE(prompt)                         | losses.loss_terms                          |
    |        divided by the supervised tokens of the step        | step.training_step                         |
    | 8      PEFT saves names with `lora_`; the echo has none    | model.EchoModel.__init__, its `echo`       |
    |        the echo is removed from the model                  | model.EchoModel.unload, merge_and_unload   |

`config.EchoConfig` names every choice; `model.EchoModel` makes a PEFT model of it. The rest makes the step exact and
cheap on real models: prefix (shared keys and values), alignment (padding), lm_head (logits at supervised positions),
checkpointing, neftune, sharing and trial (may the prefix be shared?), refusals (what is not supported), variants, and
targets (which modules carry the echo), and kept_echo (generating with the echo on). Nothing here imports recipes, files
or trainers.

Who made a choice: [P] the paper's abstract, [R] the only public third-party attempt, [O] this project.
"""
