"""The autotuner: cost model, search, timing and store, imported as ``rtk.autotune``.

Empty for now: :meth:`rtk.spec.KernelSpec.pick` chooses a configuration from a small rule. Its answer is what this
package will compute, so nothing else has to change when it arrives.
"""
