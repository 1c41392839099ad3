//! The functions that the library replaces, called by an ordinary program: this test itself, run again
//! with the library in front of libc.

mod common;

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use common::inside;
use kvm_ops_uapi::ioctl::{self, Ioctl};
use kvm_ops_uapi::irq::{Irqfd, irqfd_flags};
use kvm_ops_uapi::irqchip::Irqchip;
use kvm_ops_uapi::memory::{CreateGuestMemfd, gmem_flags};
use kvm_ops_uapi::run::{MMAP_SIZE, exit_reason};
use kvm_ops_uapi::{Errno, U32, U64, cap};
use libc::{c_int, c_void};

fn errno() -> Errno {
    Errno(std::io::Error::last_os_error().raw_os_error().unwrap_or(0))
}

fn call(fd: &impl AsRawFd, ioctl: Ioctl, argument: u64) -> Result<c_int, Errno> {
    // SAFETY: the library behind this checks every address.
    let answer = unsafe { libc::ioctl(fd.as_raw_fd(), ioctl.number().into(), argument) };
    if answer < 0 { Err(errno()) } else { Ok(answer) }
}

/// A call that makes a file.
fn make(fd: &impl AsRawFd, ioctl: Ioctl, argument: u64) -> OwnedFd {
    let new = call(fd, ioctl, argument).expect("a new file");
    // SAFETY: the call has just made it.
    unsafe { OwnedFd::from_raw_fd(new) }
}

fn kvm() -> File {
    File::open("/dev/kvm").expect("the library's")
}

fn guest_memfd(vm: &OwnedFd, flags: u64) -> OwnedFd {
    let args = CreateGuestMemfd {
        size: U64::new(0x4000),
        flags: U64::new(flags),
        ..CreateGuestMemfd::default()
    };
    make(vm, ioctl::KVM_CREATE_GUEST_MEMFD, &raw const args as u64)
}

fn map(fd: &impl AsRawFd, len: u64, flags: c_int) -> Result<*mut u8, Errno> {
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping, at an address of the system's choice.
    let at = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            len as usize,
            prot,
            flags,
            fd.as_raw_fd(),
            0,
        )
    };
    if at == libc::MAP_FAILED {
        Err(errno())
    } else {
        Ok(at.cast())
    }
}

#[test]
fn a_program_opens_kvm_and_makes_vms_of_the_machines_types() {
    if !inside("a_program_opens_kvm_and_makes_vms_of_the_machines_types") {
        return;
    }
    let kvm = kvm();
    assert_eq!(call(&kvm, ioctl::KVM_GET_API_VERSION, 0), Ok(12));
    let types = call(&kvm, ioctl::KVM_CHECK_EXTENSION, cap::VM_TYPES.into());
    assert_eq!(types, Ok(0b1_1111));
    for kind in 0..64 {
        let vm = call(&kvm, ioctl::KVM_CREATE_VM, kind);
        assert_eq!(vm.is_ok(), kind < 5, "{kind}");
    }
    assert!(File::open("/dev/sev").is_ok());
    assert!(
        File::open("/proc/self/status").is_ok(),
        "other files are as they were"
    );
}

#[test]
fn bad_addresses_are_answers_and_not_signals() {
    if !inside("bad_addresses_are_answers_and_not_signals") {
        return;
    }
    let vm = make(&kvm(), ioctl::KVM_CREATE_VM, 2);
    for ioctl in [
        ioctl::KVM_SET_USER_MEMORY_REGION2,
        ioctl::KVM_CREATE_GUEST_MEMFD,
        ioctl::KVM_ENABLE_CAP,
        ioctl::KVM_MEMORY_ENCRYPT_OP,
        ioctl::KVM_GET_CLOCK,
    ] {
        for address in [1, 0x1000, u64::MAX, 1 << 63, 0x7fff_ffff_f000] {
            assert_eq!(
                call(&vm, ioctl, address),
                Err(Errno::EFAULT),
                "{}",
                ioctl.name()
            );
        }
    }
}

#[test]
fn a_vcpus_run_page_is_shared_between_the_program_and_its_runs() {
    if !inside("a_vcpus_run_page_is_shared_between_the_program_and_its_runs") {
        return;
    }
    let vm = make(&kvm(), ioctl::KVM_CREATE_VM, 0);
    let vcpu = make(&vm, ioctl::KVM_CREATE_VCPU, 0);
    let page = map(&vcpu, MMAP_SIZE, libc::MAP_SHARED).expect("a run page");
    // SAFETY: the mapping has three pages, which nothing unmaps; the fields are bytes 1 and 8 to 11.
    let (immediate, reason) = unsafe { (page.add(1), page.add(8).cast::<u32>()) };
    // SAFETY: as above.
    unsafe { immediate.write_volatile(1) };
    assert_eq!(call(&vcpu, ioctl::KVM_RUN, 0), Err(Errno::EINTR));
    // SAFETY: as above.
    unsafe { immediate.write_volatile(0) };
    drop(vm);
    assert_eq!(
        call(&vcpu, ioctl::KVM_RUN, 0),
        Ok(0),
        "the vCPU keeps its VM"
    );
    // SAFETY: as above.
    let reason = unsafe { reason.read_volatile() };
    assert_eq!(reason, exit_reason::INTERNAL_ERROR);
}

#[test]
fn guest_memfds_are_mapped_duplicated_and_punched_as_their_flags_allow() {
    if !inside("guest_memfds_are_mapped_duplicated_and_punched_as_their_flags_allow") {
        return;
    }
    let vm = make(&kvm(), ioctl::KVM_CREATE_VM, 0);
    let closed = guest_memfd(&vm, 0);
    assert_eq!(map(&closed, 0x4000, libc::MAP_SHARED), Err(Errno::ENODEV));
    let open = guest_memfd(&vm, gmem_flags::MMAP | gmem_flags::INIT_SHARED);
    assert_eq!(map(&open, 0x4000, libc::MAP_PRIVATE), Err(Errno::EINVAL));
    let copy = open.try_clone().expect("a duplicate");
    let page = map(&copy, 0x4000, libc::MAP_SHARED).expect("a mapping");
    // SAFETY: the mapping has four pages, which nothing unmaps.
    unsafe { page.write_volatile(7) };
    let punch = |mode: c_int, offset: i64| {
        let fd = copy.as_raw_fd();
        // SAFETY: no memory is passed.
        match unsafe { libc::fallocate(fd, mode, offset, 0x1000) } {
            0 => Ok(()),
            _ => Err(errno()),
        }
    };
    let hole = libc::FALLOC_FL_KEEP_SIZE | libc::FALLOC_FL_PUNCH_HOLE;
    assert_eq!(punch(hole, 1), Err(Errno::EINVAL));
    assert_eq!(punch(0, 0), Err(Errno::EOPNOTSUPP));
    // SAFETY: as above.
    assert_eq!(unsafe { page.read_volatile() }, 7);
    assert_eq!(punch(hole, 0), Ok(()));
    // SAFETY: as above.
    assert_eq!(unsafe { page.read_volatile() }, 0, "a new page");
    let mut byte = [0u8];
    // SAFETY: one byte is there.
    let read = unsafe { libc::read(open.as_raw_fd(), byte.as_mut_ptr().cast::<c_void>(), 1) };
    assert_eq!((read, errno()), (-1, Errno::EINVAL));
}

#[test]
fn a_forked_child_gets_eio_and_its_parent_goes_on() {
    if !inside("a_forked_child_gets_eio_and_its_parent_goes_on") {
        return;
    }
    let vm = make(&kvm(), ioctl::KVM_CREATE_VM, 0);
    // SAFETY: the child makes system calls alone, and leaves by _exit.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let answer = call(&vm, ioctl::KVM_CHECK_EXTENSION, 3);
        // SAFETY: as above.
        unsafe { libc::_exit(answer.err().map_or(0, |errno| errno.0)) };
    }
    let mut status = 0;
    // SAFETY: the status is ours.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    assert_eq!(Errno(libc::WEXITSTATUS(status)), Errno::EIO);
    assert_eq!(call(&vm, ioctl::KVM_CHECK_EXTENSION, 3), Ok(1));
}

fn eventfd() -> OwnedFd {
    // SAFETY: no memory is passed.
    let fd = unsafe { libc::eventfd(0, libc::EFD_NONBLOCK) };
    assert!(fd >= 0);
    // SAFETY: the call has just made it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn count(event: &OwnedFd) -> Option<u64> {
    let mut count = 0u64;
    // SAFETY: eight bytes are there.
    let read = unsafe { libc::read(event.as_raw_fd(), (&raw mut count).cast(), 8) };
    (read == 8).then_some(count)
}

fn signal(event: &OwnedFd) {
    let one = 1u64;
    // SAFETY: eight bytes are there.
    let written = unsafe { libc::write(event.as_raw_fd(), (&raw const one).cast(), 8) };
    assert_eq!(written, 8);
}

fn irqfd(event: c_int, gsi: u32, flags: u32) -> Irqfd {
    Irqfd {
        fd: U32::new(event as u32),
        gsi: U32::new(gsi),
        flags: U32::new(flags),
        ..Irqfd::default()
    }
}

#[test]
fn an_eventfd_is_known_by_each_of_its_numbers_and_raises_its_line() {
    if !inside("an_eventfd_is_known_by_each_of_its_numbers_and_raises_its_line") {
        return;
    }
    let vm = make(&kvm(), ioctl::KVM_CREATE_VM, 0);
    call(&vm, ioctl::KVM_CREATE_IRQCHIP, 0).expect("an irqchip");
    let (event, end) = (eventfd(), eventfd());
    let copy = event.try_clone().expect("a duplicate");
    let set = |args: Irqfd| call(&vm, ioctl::KVM_IRQFD, &raw const args as u64);
    for (number, errno) in [
        (vm.as_raw_fd(), Errno::EINVAL),
        (0, Errno::EINVAL),
        (999, Errno::EBADF),
    ] {
        assert_eq!(set(irqfd(number, 5, 0)), Err(errno), "{number}");
    }
    let level = Irqfd {
        resamplefd: U32::new(end.as_raw_fd() as u32),
        ..irqfd(event.as_raw_fd(), 5, irqfd_flags::RESAMPLE)
    };
    assert_eq!(set(level), Ok(0));
    assert_eq!(set(irqfd(copy.as_raw_fd(), 6, 0)), Err(Errno::EBUSY));
    signal(&copy);
    let high = || {
        let mut chip = Irqchip::default();
        call(&vm, ioctl::KVM_GET_IRQCHIP, &raw mut chip as u64).expect("the first 8259A");
        chip.state[0] >> 5 & 1 != 0
    };
    while !high() {
        std::thread::yield_now();
    }
    assert_eq!(count(&event), None, "the signal was taken");
    assert_eq!(
        set(irqfd(copy.as_raw_fd(), 5, irqfd_flags::DEASSIGN)),
        Ok(0)
    );
    assert!(!high(), "nobody is left to take the level back");
    signal(&event);
    assert_eq!(count(&copy), Some(1), "it is the program's again");
    assert_eq!(count(&end), None);
}
