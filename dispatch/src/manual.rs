//! The manual: the pages of `docs/`, so that they are where the library is.

/// Definitions of the links between pages. They stand before the text of a page, so that they win
/// over the definitions at its end, which serve readers of the files.
macro_rules! links {
    () => {
        "[DESIGN.md]: crate::manual::design\n\
         [attestation.md]: crate::manual::attestation\n\
         [benchmarks.md]: crate::manual::benchmarks\n\
         [dependencies.md]: crate::manual::dependencies\n\
         [devices.md]: crate::manual::devices\n\
         [evidence-samples.md]: crate::manual::evidence_samples\n\
         [features.md]: crate::manual::features\n\
         [flipped-bits.md]: crate::manual::flipped_bits\n\
         [guest-testing.md]: crate::manual::guest_testing\n\
         [guest.md]: crate::manual::guest\n\
         [hostile-host.md]: crate::manual::hostile_host\n\
         [kvm-client.md]: crate::manual::kvm_client\n\
         [kvm-unit-tests.md]: crate::manual::kvm_unit_tests\n\
         [machine-code.md]: crate::manual::machine_code\n\
         [measurement.md]: crate::manual::measurement\n\
         [migration.md]: crate::manual::migration\n\
         [mirror.md]: crate::manual::mirror\n\
         [ops.md]: crate::manual::ops\n\
         [own-back-end.md]: crate::manual::own_back_end\n\
         [own-host.md]: crate::manual::own_host\n\
         [plots.md]: crate::manual::plots\n\
         [sev-failures.md]: crate::manual::sev_failures\n\
         [sev.md]: crate::manual::sev\n\
         [softkvm.md]: crate::manual::softkvm\n\
         [tdx-failures.md]: crate::manual::tdx_failures\n\
         [tdx-run.md]: crate::manual::tdx_run\n\
         [tdx.md]: crate::manual::tdx\n\
         [testing.md]: crate::manual::testing\n\
         [when-a-vm-ends.md]: crate::manual::when_a_vm_ends\n\n"
    };
}
#[cfg(all(feature = "sim", feature = "vmx"))] // For the front page.
pub(crate) use links;

/// One module for each page.
macro_rules! pages {
    ($($name:ident: $file:literal;)*) => {
        $(
            #[doc = links!()]
            #[doc = include_str!(concat!("../../", $file))]
            pub mod $name {}
        )*
    };
}

pages! {
    design: "DESIGN.md";
    attestation: "docs/attestation.md";
    benchmarks: "docs/benchmarks.md";
    dependencies: "docs/dependencies.md";
    devices: "docs/devices.md";
    evidence_samples: "docs/evidence-samples.md";
    features: "docs/features.md";
    flipped_bits: "docs/flipped-bits.md";
    guest: "docs/guest.md";
    guest_testing: "docs/guest-testing.md";
    hostile_host: "docs/hostile-host.md";
    kvm_client: "docs/kvm-client.md";
    kvm_unit_tests: "docs/kvm-unit-tests.md";
    machine_code: "docs/machine-code.md";
    measurement: "docs/measurement.md";
    migration: "docs/migration.md";
    mirror: "docs/mirror.md";
    ops: "docs/ops.md";
    own_back_end: "docs/own-back-end.md";
    own_host: "docs/own-host.md";
    sev: "docs/sev.md";
    sev_failures: "docs/sev-failures.md";
    softkvm: "docs/softkvm.md";
    tdx: "docs/tdx.md";
    tdx_failures: "docs/tdx-failures.md";
    tdx_run: "docs/tdx-run.md";
    testing: "docs/testing.md";
    when_a_vm_ends: "docs/when-a-vm-ends.md";
}

/// The page of plots, with the pictures in the text.
macro_rules! plots {
    ($($file:literal)*) => {
        /// # Plots
        ///
        /// The plots of the [benchmarks](crate::manual::benchmarks) and of the [mirror](crate::manual::mirror).
        $(
            #[doc = ""]
            #[doc = include_str!(concat!("../../docs/plots/", $file, ".svg"))]
            #[doc = ""]
        )*
        pub mod plots {}
    };
}

plots! {
    "one-technology-intel-xeon" "mixed-intel-xeon" "retpoline-intel-xeon" "proportion-intel-xeon"
    "one-technology-amd-epyc" "mixed-amd-epyc" "retpoline-amd-epyc" "proportion-amd-epyc" "measurement" "life-end" "life-small"
    "mirror-1g" "mirror-16g" "mirror-threads" "mirror-calls"
}
