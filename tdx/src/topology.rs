//! Processors and packages.

use alloc::vec::Vec;

use kvm_ops::{CpuId, Error, Field, PackageId, Result, SeamPort};

/// An online processor of every package that is present, in the order of packages.
///
/// The key of a TD is configured on every package, and the caches of every package are written back
/// before the key is free: memory of any package may hold lines of the TD. So a package without an
/// online processor stops both.
///
/// # Errors
/// [`Error::NotFound`] with [`Field::OnlineCpu`] names the first package that has none.
pub(crate) fn one_cpu_per_package(seam: &impl SeamPort) -> Result<Vec<CpuId>> {
    let of = |package| {
        (0..seam.cpus())
            .map(CpuId)
            .find(|cpu| seam.package_of(*cpu) == Some(package))
            .ok_or(Error::NotFound(Field::OnlineCpu, package.0.into()))
    };
    (0..seam.packages()).map(|n| of(PackageId(n))).collect()
}

/// Returns whether `cpu` is the last online processor of its package.
pub(crate) fn is_last_of_package(seam: &impl SeamPort, cpu: CpuId) -> bool {
    let package = seam.package_of(cpu);
    package.is_some()
        && !(0..seam.cpus())
            .map(CpuId)
            .any(|other| other != cpu && seam.package_of(other) == package)
}
