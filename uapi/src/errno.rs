//! The errors of system calls.

use core::fmt;

/// An errno of Linux on x86-64: 1 to 4095.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Errno(pub i32);

macro_rules! errnos {
    ($($name:ident = $number:literal, $doc:literal;)*) => {
        impl Errno {
            $(#[doc = $doc] pub const $name: Self = Self($number);)*

            /// The name in `errno.h`. `None` for a number that KVM's calls do not use.
            pub const fn name(self) -> Option<&'static str> {
                match self.0 {
                    $($number => Some(stringify!($name)),)*
                    _ => None,
                }
            }
        }
    };
}

errnos! {
    EPERM = 1, "Not for this kind of VM.";
    ENOENT = 2, "No slot is there.";
    EINTR = 4, "A signal came.";
    EIO = 5, "Firmware refused, or the VM is dead, or another process's.";
    ENXIO = 6, "No such attribute.";
    E2BIG = 7, "The list is too short, or too long.";
    EBADF = 9, "Not a descriptor of the kind that is needed.";
    EAGAIN = 11, "Nothing changed: call again.";
    ENOMEM = 12, "No memory.";
    EFAULT = 14, "An address that is not mapped.";
    EBUSY = 16, "Another call is using it, or all are in use.";
    EEXIST = 17, "It exists, or its place is taken.";
    ENODEV = 19, "The file cannot be mapped, or there is no device.";
    EINVAL = 22, "A bad argument.";
    EMFILE = 24, "No free descriptor.";
    ENOTTY = 25, "Not a call of this file, or not of this kind of VM.";
    ENOSPC = 28, "No key is free.";
    ESPIPE = 29, "The file has no position.";
    EOPNOTSUPP = 95, "Not of this kind of VM, or not yet.";
    EHWPOISON = 133, "The memory is broken.";
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "errno {}", self.0),
        }
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl core::error::Error for Errno {}

#[cfg(test)]
mod tests {
    use super::*;
    use std::string::ToString;

    #[test]
    fn an_errno_prints_its_name_or_its_number() {
        assert_eq!(Errno::ENOTTY.to_string(), "ENOTTY");
        assert_eq!(Errno(3).to_string(), "errno 3");
    }
}
