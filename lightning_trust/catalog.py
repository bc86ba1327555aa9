"""The one list of methods: what each is called, where it comes from and where its parts stand."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

FAMILIES = (
    "pruning",
    "unlearning",
    "adversarial",
    "certification",
    "zeroth_order",
    "prompting",
    "backdoor",
    "diffusion",
    "continual",
    "fairness",
    "invariance",
    "bilevel",
    "language",
    "graphs",
    "imaging",
    "reinforcement",
    "recommendation",
    "explanation",
    "optimization",
    "theory",
)


@dataclass(frozen=True)
class Paper:
    """Where a method comes from.

    Args:
        title: Title of the paper.
        venue: Where and when it appeared, with its arXiv number where it has one.

    """

    title: str
    venue: str


@dataclass(frozen=True)
class MethodEntry:
    """One method of the package.

    Args:
        name: Name on the command line, in lower case with hyphens.
        title: What it is, in one line.
        papers: The papers that it comes from, the main one first.
        family: One of :data:`FAMILIES`, the folder of its files in every room.
        classes: Import paths of its public classes, the main one first.
        config: Every hyperparameter of the small offline run.
        docs: Its page of documentation.
        results: What its small experiment measured.
        proofs: Its test files.

    """

    name: str
    title: str
    papers: tuple[Paper, ...]
    family: str
    classes: tuple[str, ...]
    config: str
    docs: str
    results: str
    proofs: tuple[str, ...]

    @property
    def paper_config(self) -> str:
        """The hyperparameters of the paper's full scale."""
        return self.config.removesuffix(".yaml") + ".paper.yaml"

    @property
    def overlay_config(self) -> str:
        """What adds the method to a user's own configuration."""
        return self.config.removesuffix(".yaml") + ".overlay.yaml"


def _entry(
    name: str, title: str, papers: tuple[Paper, ...], family: str, classes: tuple[str, ...], room: str = "callbacks"
) -> MethodEntry:
    # one method, one file name, in every room
    file = f"{family}/{name.replace('-', '_')}"
    folder, _, base = file.rpartition("/")
    return MethodEntry(
        name=name,
        title=title,
        papers=papers,
        family=family,
        classes=classes,
        config=f"configs/{file}.yaml",
        docs=f"docs/{file}.md",
        results=f"benchmarks/results/{file}.json",
        proofs=(f"tests/{room}/{folder}/test_{base}.py",),
    )


_SPARSE_UNLEARNING = Paper("Model Sparsity Can Simplify Machine Unlearning", "NeurIPS 2023, arXiv:2304.04934")
_ETERNAL_SUNSHINE = Paper(
    "Eternal Sunshine of the Spotless Net: Selective Forgetting in Deep Networks", "CVPR 2020, arXiv:1911.04933"
)
_SALUN = Paper(
    "SalUn: Empowering Machine Unlearning via Gradient-based Weight Saliency in Both Image Classification"
    " and Generation",
    "ICLR 2024, arXiv:2310.12508",
)
_DAT = Paper("Distributed Adversarial Training to Robustify Deep Neural Networks at Scale", "UAI 2022, PMLR 180")

METHODS: tuple[MethodEntry, ...] = (
    _entry(
        "one-shot-pruning",
        "Zero the smallest, or random, weights once and hold them at zero",
        (
            Paper("Learning both Weights and Connections for Efficient Neural Networks", "NIPS 2015, arXiv:1506.02626"),
            Paper("Rigging the Lottery: Making All Tickets Winners", "ICML 2020, arXiv:1911.11134"),
        ),
        "pruning",
        ("lightning_trust.callbacks.OneShotPruning",),
    ),
    _entry(
        "fine-tune",
        "Go on training on the rows that are kept",
        (_ETERNAL_SUNSHINE, _SPARSE_UNLEARNING),
        "unlearning",
        ("lightning_trust.callbacks.FineTune",),
    ),
    _entry(
        "random-label",
        "Train with random labels on the rows to be forgotten",
        (_ETERNAL_SUNSHINE, _SALUN),
        "unlearning",
        ("lightning_trust.callbacks.RandomLabel",),
    ),
    _entry(
        "l1-sparse",
        "Fine-tune with an l1 penalty that fades out",
        (_SPARSE_UNLEARNING,),
        "unlearning",
        ("lightning_trust.callbacks.L1Sparse",),
    ),
    _entry(
        "salun",
        "Random labels, moving only the weights that matter to the rows to be forgotten",
        (_SALUN,),
        "unlearning",
        ("lightning_trust.callbacks.SalUn", "lightning_trust.callbacks.WeightSaliency"),
    ),
    _entry(
        "robust-evaluation",
        "Measure accuracy under attacks in validation and test, with intervals, resume and a self-test",
        (
            Paper(
                "Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free Attacks",
                "ICML 2020, arXiv:2003.01690",
            ),
            Paper("Increasing Confidence in Adversarial Robustness Evaluations", "NeurIPS 2022, arXiv:2206.13991"),
        ),
        "adversarial",
        ("lightning_trust.callbacks.RobustEvaluation",),
    ),
    _entry(
        "adversarial-training",
        "Train on inputs that an attack makes against the network as it is; seven objectives",
        (
            Paper("Towards Deep Learning Models Resistant to Adversarial Attacks", "ICLR 2018, arXiv:1706.06083"),
            Paper("Theoretically Principled Trade-off between Robustness and Accuracy", "ICML 2019, arXiv:1901.08573"),
            Paper(
                "Improving Adversarial Robustness Requires Revisiting Misclassified Examples", "ICLR 2020, OpenReview"
            ),
            Paper("Fast is better than free: Revisiting adversarial training", "ICLR 2020, arXiv:2001.03994"),
            Paper(
                "Revisiting and Advancing Fast Adversarial Training Through The Lens of Bi-Level Optimization",
                "ICML 2022, arXiv:2112.12376",
            ),
            Paper("Understanding and Improving Fast Adversarial Training", "NeurIPS 2020, arXiv:2007.02617"),
        ),
        "adversarial",
        (
            "lightning_trust.callbacks.AdversarialTraining",
            "lightning_trust.callbacks.TRADES",
            "lightning_trust.callbacks.MART",
            "lightning_trust.callbacks.FastBAT",
            "lightning_trust.callbacks.GradAlign",
            "lightning_trust.callbacks.CleanAndAdversarial",
        ),
    ),
    _entry(
        "free-adversarial-training",
        "Get the attack from the backward pass that trains the weights, on batches that are repeated",
        (Paper("Adversarial Training for Free!", "NeurIPS 2019, arXiv:1904.12843"),),
        "adversarial",
        ("lightning_trust.callbacks.FreeAdversarialTraining", "lightning_trust.datamodules.RepeatBatches"),
    ),
    _entry(
        "awp",
        "Take every gradient at the weights that are worst in a small neighbourhood",
        (Paper("Adversarial Weight Perturbation Helps Robust Generalization", "NeurIPS 2020, arXiv:2004.05884"),),
        "adversarial",
        ("lightning_trust.callbacks.AWP",),
    ),
    _entry(
        "dat",
        "Adversarial training with large batches on many ranks, and gradients exchanged in few bits",
        (_DAT,),
        "adversarial",
        (
            "lightning_trust.callbacks.QuantizedAllReduce",
            "lightning_trust.optim.LAMB",
            "lightning_trust.optim.LARS",
            "lightning_trust.datamodules.PseudoLabeledData",
        ),
    ),
    _entry(
        "saliency-guided-adversarial-training",
        "Train for a new site: drown faint shortcuts in adversarial inputs, ignore features that matter little",
        (
            Paper(
                "Saliency Guided Adversarial Training for Learning Generalizable Features with Applications to Medical"
                " Imaging Classification System",
                "2022, arXiv:2209.04326",
            ),
            Paper(
                "Improving Deep Learning Interpretability by Saliency Guided Training", "NeurIPS 2021, arXiv:2111.14338"
            ),
        ),
        "adversarial",
        (
            "lightning_trust.callbacks.SaliencyGuidedAdversarialTraining",
            "lightning_trust.callbacks.OODEvaluation",
            "lightning_trust.metrics.SaliencyMass",
            "lightning_trust.metrics.GroupBootstrap",
            "lightning_trust.datamodules.ShortcutFashionMNIST",
            "lightning_trust.datamodules.CXRDataModule",
        ),
    ),
    _entry(
        "advmoe",
        "Train a network of experts and its router in turn, each robust to inputs that attack both",
        (Paper("Robust Mixture-of-Expert Training for Convolutional Neural Networks", "ICCV 2023, arXiv:2308.10110"),),
        "adversarial",
        ("lightning_trust.callbacks.AdvMoE", "lightning_trust.attacks.RoutedPGD"),
    ),
    _entry(
        "robust-mode-connectivity",
        "Train a curve between two networks, each robust to one norm, so that its points resist several at once",
        (
            Paper(
                "Bridging Models to Defend: A Population-Based Strategy for Robust Adversarial Defense",
                "2023, arXiv:2303.10225",
            ),
            Paper("Loss Surfaces, Mode Connectivity, and Fast Ensembling of DNNs", "NeurIPS 2018, arXiv:1802.10026"),
        ),
        "adversarial",
        (
            "lightning_trust.callbacks.RobustModeConnectivity",
            "lightning_trust.callbacks.CurveEvaluation",
            "lightning_trust.nn.CurveNetwork",
            "lightning_trust.nn.WeightEnsemble",
            "lightning_trust.callbacks.ExtremeNormTraining",
            "lightning_trust.callbacks.AverageOf",
        ),
    ),
    _entry(
        "ilm-vp",
        "Reuse a frozen classifier for another task: learn a frame around its input and what its classes stand for",
        (
            Paper(
                "Understanding and Improving Visual Prompting: A Label-Mapping Perspective",
                "CVPR 2023, arXiv:2211.11635",
            ),
        ),
        "prompting",
        (
            "lightning_trust.callbacks.VisualPrompting",
            "lightning_trust.callbacks.IterativeLabelMapping",
            "lightning_trust.callbacks.SavePrompt",
            "lightning_trust.modules.VisualPromptClassifier",
            "lightning_trust.nn.LabelMapping",
            "lightning_trust.nn.PadPrompt",
            "lightning_trust.nn.WatermarkPrompt",
            "lightning_trust.nn.PatchPrompt",
            "lightning_trust.nn.AdditivePrompt",
            "lightning_trust.datamodules.RotatedFashionMNIST",
        ),
    ),
    _entry(
        "autovp",
        "Search for the size, the mapping and the network of a visual prompt, and write the best as a configuration",
        (Paper("AutoVP: An Automated Visual Prompting Framework and Benchmark", "ICLR 2024, arXiv:2310.08381"),),
        "prompting",
        (
            "lightning_trust.recipes.AutoVPTuner",
            "lightning_trust.recipes.VPSearchSpace",
            "lightning_trust.recipes.VPConfig",
            "lightning_trust.nn.FramePrompt",
            "lightning_trust.nn.LearnableScale",
            "lightning_trust.nn.FullyMapping",
            "lightning_trust.callbacks.ScaleMonitor",
        ),
        room="recipes",
    ),
    _entry(
        "c-avp",
        "Make a frozen classifier more robust by a learned frame for every class, evaluated blind and adaptively",
        (
            Paper("Visual Prompting for Adversarial Robustness", "ICASSP 2023, arXiv:2210.06284"),
            Paper("Combating Adversaries with Anti-Adversaries", "AAAI 2022, arXiv:2103.14347"),
        ),
        "prompting",
        (
            "lightning_trust.callbacks.AdversarialPrompting",
            "lightning_trust.nn.ClassWisePrompt",
            "lightning_trust.attacks.WithoutPrompt",
            "lightning_trust.nn.AntiAdversary",
        ),
    ),
    _entry(
        "fairness-reprogram",
        "Make a frozen classifier fairer: learn a trigger at its input against an adversary that reads the group",
        (Paper("Fairness Reprogramming", "NeurIPS 2022, arXiv:2209.10222"),),
        "prompting",
        (
            "lightning_trust.callbacks.FairnessReprogramming",
            "lightning_trust.callbacks.AdversarialDebiasing",
            "lightning_trust.callbacks.FairnessEvaluation",
            "lightning_trust.nn.BorderTrigger",
            "lightning_trust.nn.PatchTrigger",
            "lightning_trust.nn.ConcatTrigger",
            "lightning_trust.nn.SoftTextTrigger",
            "lightning_trust.nn.HardTextTrigger",
            "lightning_trust.nn.FairnessAdversary",
            "lightning_trust.metrics.DemographicParityGap",
            "lightning_trust.metrics.EqualizedOddsGap",
            "lightning_trust.metrics.WorstGroupAccuracy",
        ),
    ),
    _entry(
        "dp4tl",
        "Keep the source classes that a target has use for, and pretrain on them alone",
        (
            Paper(
                "Selectivity Drives Productivity: Efficient Dataset Pruning for Enhanced Transfer Learning",
                "NeurIPS 2023, arXiv:2310.08782",
            ),
        ),
        "prompting",
        (
            "lightning_trust.callbacks.SourcePruning",
            "lightning_trust.datamodules.LabelMappingPruner",
            "lightning_trust.datamodules.FeatureMappingPruner",
            "lightning_trust.datamodules.RandomClassPruner",
            "lightning_trust.datamodules.ModeratePruner",
            "lightning_trust.datamodules.GradNormPruner",
            "lightning_trust.datamodules.ClassMeanPruner",
            "lightning_trust.datamodules.PrunedDataModule",
            "lightning_trust.datamodules.PrunedDataset",
            "lightning_trust.modules.TransferClassifier",
        ),
    ),
    _entry(
        "deepzero",
        "Train from scratch without back-propagation, from differences of the loss at a tenth of the weights",
        (
            Paper(
                "DeepZero: Scaling up Zeroth-Order Optimization for Deep Model Training",
                "ICLR 2024, arXiv:2310.02025",
            ),
        ),
        "zeroth_order",
        (
            "lightning_trust.callbacks.DynamicSparseGradient",
            "lightning_trust.callbacks.ZerothOrderGradient",
            "lightning_trust.optim.CGE",
            "lightning_trust.optim.RGE",
            "lightning_trust.optim.ForwardGradient",
            "lightning_trust.optim.ZOSGD",
            "lightning_trust.optim.ZOAdam",
            "lightning_trust.optim.ZOSignSGD",
            "lightning_trust.optim.ZOSVRG",
            "lightning_trust.optim.ZOConservative",
            "lightning_trust.optim.PatternSearch",
            "lightning_trust.modules.SolverCorrection",
            "lightning_trust.nn.PeriodicConvNet",
            "lightning_trust.datamodules.BurgersDataModule",
        ),
    ),
    _entry(
        "mezo",
        "Fine-tune a language model in the memory of inference: two forward passes a step, nothing is stored",
        (Paper("Fine-Tuning Language Models with Just Forward Passes", "NeurIPS 2023, arXiv:2305.17333"),),
        "zeroth_order",
        (
            "lightning_trust.optim.MeZO",
            "lightning_trust.modules.CausalLanguageModel",
            "lightning_trust.callbacks.SaveAdapter",
            "lightning_trust.datamodules.CodeOrProse",
            "lightning_trust.datamodules.CodeCorpus",
            "lightning_trust.datamodules.LabeledText",
            "lightning_trust.nn.LoRA",
        ),
    ),
    _entry(
        "tensor-bp-free",
        "Train networks in tensor-train form from values alone, physics-informed ones without any differentiation",
        (
            Paper(
                "Tensor-Compressed Back-Propagation-Free Training for (Physics-Informed) Neural Networks",
                "2023, arXiv:2308.09858",
            ),
        ),
        "zeroth_order",
        (
            "lightning_trust.optim.HybridZO",
            "lightning_trust.optim.SignSCD",
            "lightning_trust.nn.TTLinear",
            "lightning_trust.nn.tensorize",
            "lightning_trust.nn.SparseGridDerivatives",
            "lightning_trust.nn.SteinDerivatives",
            "lightning_trust.nn.FiniteDifference",
            "lightning_trust.modules.PINNModule",
            "lightning_trust.datamodules.PDEDataModule",
        ),
        room="modules",
    ),
    _entry(
        "zo-sciml",
        "Put an unmodified simulator or program into the network, and train through it from its answers alone",
        (
            Paper(
                "Zeroth-Order SciML: Non-intrusive Integration of Scientific Software with Deep Learning",
                "2022, arXiv:2206.02785",
            ),
        ),
        "zeroth_order",
        (
            "lightning_trust.modules.SKSModule",
            "lightning_trust.nn.BlackBoxLayer",
            "lightning_trust.nn.Simulator",
            "lightning_trust.callbacks.KnowledgeLoss",
            "lightning_trust.callbacks.SKSQueryMonitor",
            "lightning_trust.datamodules.ElementDensityDataModule",
            "lightning_trust.datamodules.OscillatorDataModule",
        ),
        room="modules",
    ),
)


def methods(family: str | None = None) -> tuple[MethodEntry, ...]:
    """The methods of the package, or of one family.

    Args:
        family: One of :data:`FAMILIES`; ``None`` for all.

    Returns:
        The entries in the order of :data:`METHODS`.

    Raises:
        ValueError: If there is no such family; close names are listed.

    Example:
        >>> [entry.name for entry in methods("pruning")]
        ['one-shot-pruning']

    """
    if family is not None and family not in FAMILIES:
        raise ValueError(
            f"Expected argument `family` to be one of {list(FAMILIES)}, but got {_guess(family, FAMILIES)}"
        )
    return tuple(entry for entry in METHODS if family in (None, entry.family))


def method(name: str) -> MethodEntry:
    """The method of that name.

    Args:
        name: Its name, e.g. ``"salun"``, or the name of one of its classes, e.g. ``"SalUn"``.

    Raises:
        ValueError: If there is no such method; close names are listed.

    Example:
        >>> method("salun").classes[0], method("WeightSaliency").name
        ('lightning_trust.callbacks.SalUn', 'salun')

    """
    for entry in METHODS:
        if name == entry.name or name in {path.rpartition(".")[2] for path in entry.classes}:
            return entry
    names = [entry.name for entry in METHODS]
    raise ValueError(
        f"Expected argument `name` to be a method of `lightning-trust methods`, but got {_guess(name, names)}"
    )


def _guess(name: str, names: tuple[str, ...] | list[str]) -> str:
    close = difflib.get_close_matches(name.lower().replace("_", "-"), names) or difflib.get_close_matches(name, names)
    return f"{name!r}. Did you mean {' or '.join(map(repr, close))}?" if close else f"{name!r}."
