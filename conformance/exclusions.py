"""Tests of Transformers that do not apply to LinMU, and why: `Class.test` or, for every class, `test` -> reason.

Beside these, the mixins skip tests by themselves: for want of a device or a package, or because a model lacks what
they are about. `docs/conformance.md` lists both kinds.
"""

ONE_PART = "about models of one part; `test_sdpa_can_dispatch_composite_models` is the one for ours"
NO_WEIGHTS = "expects attention weights of every layer; M-MATE layers compute none (`TestTeacher` runs it)"

TILES = "asks for the states of the tower, which reads many tiles in chunks and returns features alone"
BEFORE_THE_END = "NVILA reads its tower before the last layer, whose parameters get no gradient"

EXCLUSIONS = {
    "TestVisionText.test_attention_outputs": NO_WEIGHTS,
    "TestHybrid.test_attention_outputs": NO_WEIGHTS,
    "TestText.test_attention_outputs": NO_WEIGHTS,
    "TestNVILA.test_attention_outputs": NO_WEIGHTS,
    "TestVisionText.test_retain_grad_hidden_states_attentions": NO_WEIGHTS,
    "TestText.test_retain_grad_hidden_states_attentions": NO_WEIGHTS,
    "TestTeacher.test_keep_in_fp32_modules_exist": "names parameters of the scan; a teacher's decoder has no scan",
    "TestVisionText.test_sdpa_can_dispatch_non_composite_models": ONE_PART,
    "TestHybrid.test_sdpa_can_dispatch_non_composite_models": ONE_PART,
    "TestNVILA.test_sdpa_can_dispatch_non_composite_models": ONE_PART,
    "TestNVILA.test_get_image_features_attentions": TILES,
    "TestNVILA.test_get_image_features_hidden_states": TILES,
    "TestNVILA.test_get_video_features_attentions": TILES,
    "TestNVILA.test_get_video_features_hidden_states": TILES,
    "TestNVILA.test_training_gradient_checkpointing": BEFORE_THE_END,
    "TestNVILA.test_training_gradient_checkpointing_use_reentrant_false": BEFORE_THE_END,
    "TestNVILA.test_training_gradient_checkpointing_use_reentrant_true": BEFORE_THE_END,
    "TestNVILA.test_can_init_all_missing_weights": (
        "as part of a model that is not Transformers' own, SigLIP gives weights that a checkpoint lacks another start"
    ),
    "test_bc_cache_name_forward": (
        "asks for a warning at the older name of the cache; LinMU takes both names with every Transformers"
    ),
    "test_multimodal_outputs_are_returned": (
        "asks for the vision tower's outputs in those of the model; here `get_image_features` returns them"
    ),
    "test_generation_tester_mixin_inheritance": (
        "asks for a mixin that the source distribution lacks; `conformance/test_generation.py` stands in for it"
    ),
}
