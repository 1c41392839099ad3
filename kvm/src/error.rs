//! From an errno to the framework's error.

use kvm_ops::{Call, Error};

/// For `map_err`: the error of that system call.
pub(crate) fn sys(call: Call) -> impl Fn(kvm_ioctls::Error) -> Error {
    move |error| from_errno(call, error.errno())
}

/// The error of a system call that set this errno.
pub(crate) fn from_errno(call: Call, errno: i32) -> Error {
    match errno {
        libc::ENOMEM => Error::NoMemory,
        errno => Error::Sys(call, errno),
    }
}

/// `Err(Error::HostLacks)` for a capability of that name.
macro_rules! host_lacks {
    ($name:literal) => {{
        static NAME: kvm_ops::OpName = kvm_ops::OpName($name);
        Err(kvm_ops::Error::HostLacks(&NAME))
    }};
}
pub(crate) use host_lacks;
