"""Transformers' own tests of models and configurations, on our classes."""

import unittest

from testers import IMAGE, NVILATester, TextTester, VisionTextTester
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_modeling_common import ModelTesterMixin

from linmu_hf import LinMUConfig, LinMUForConditionalGeneration, LinMUModel, LinMUTextConfig, LinMUTextModel


class Conformance(ModelTesterMixin):
    test_torch_exportable = False
    test_can_init_all_missing_weights_before_2023 = True  # asks for a year in the source, which ours does not have

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        """Gives back the images of a batch of which a test has kept the ids alone."""
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        ids = inputs.get("input_ids")
        if ids is not None and "pixel_values" not in inputs and (ids == IMAGE).any():
            inputs = self.model_tester.with_images(inputs)
        return inputs


class TestVisionText(Conformance, unittest.TestCase):
    """M-MATE in every layer: what `linmu-convert` writes by default."""

    all_model_classes = (LinMUModel, LinMUForConditionalGeneration)
    _is_composite = True

    def setUp(self):
        self.model_tester = VisionTextTester(self)


class TestHybrid(Conformance, unittest.TestCase):
    """A student that keeps some of its teacher's attention."""

    all_model_classes = (LinMUModel, LinMUForConditionalGeneration)
    _is_composite = True

    def setUp(self):
        self.model_tester = VisionTextTester(self, ("full_attention", "m_mate"))


class TestNVILA(Conformance, unittest.TestCase):
    """A student of NVILA that keeps some of its teacher's attention."""

    all_model_classes = (LinMUModel, LinMUForConditionalGeneration)
    _is_composite = True

    def setUp(self):
        self.model_tester = NVILATester(self, ("full_attention", "m_mate"))


class TestText(Conformance, unittest.TestCase):
    """The decoder alone."""

    all_model_classes = (LinMUTextModel,)

    def setUp(self):
        self.model_tester = TextTester(self)


class TestTeacher(Conformance, unittest.TestCase):
    """The decoder of a teacher: attention in every layer."""

    all_model_classes = (LinMUTextModel,)

    def setUp(self):
        self.model_tester = TextTester(self, ("full_attention", "full_attention"))


class TestConfigurations(unittest.TestCase):
    """Both configurations."""

    def test_composite(self):
        self.model_tester = VisionTextTester(self)
        ConfigTester(self, config_class=LinMUConfig, has_text_modality=False).run_common_tests()

    def test_text(self):
        ConfigTester(self, config_class=LinMUTextConfig, hidden_size=32, num_attention_heads=4).run_common_tests()
