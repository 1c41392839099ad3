//! The functions that the library replaces, called by an ordinary program: this test itself, run again
//! with the library in front of libc.

mod common;

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use common::{again_with, inside};
use kvm_ops_uapi::ioctl::{self, Ioctl};
use kvm_ops_uapi::irq::{Irqfd, irqfd_flags};
use kvm_ops_uapi::irqchip::Irqchip;
use kvm_ops_uapi::memory::{CreateGuestMemfd, UserspaceMemoryRegion, gmem_flags};
use kvm_ops_uapi::run::{COALESCED_MMIO_PAGE, MMAP_SIZE, PIO_PAGE, exit_reason};
use kvm_ops_uapi::state::{Regs, Sregs};
use kvm_ops_uapi::system::vm_type;
use kvm_ops_uapi::{Errno, U16, U32, U64, cap};
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
fn a_forked_child_gets_eio_and_opens_a_machine_of_its_own() {
    if !inside("a_forked_child_gets_eio_and_opens_a_machine_of_its_own") {
        return;
    }
    let vm = make(&kvm(), ioctl::KVM_CREATE_VM, 0);
    // SAFETY: there is no other thread that could hold a lock, and the child leaves by _exit.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let answer = call(&vm, ioctl::KVM_CHECK_EXTENSION, 3);
        let own = make(&kvm(), ioctl::KVM_CREATE_VM, vm_type::SNP);
        let own = call(&own, ioctl::KVM_CHECK_EXTENSION, 3);
        let errno = answer.err().filter(|_| own == Ok(1));
        // SAFETY: as above.
        unsafe { libc::_exit(errno.map_or(0, |errno| errno.0)) };
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

#[test]
fn a_plan_of_faults_reaches_the_program() {
    const PLAN: &str = "[[fault]]\ncall = 'KVM_CREATE_VM'\nnth = 2\nerrno = 'ENOMEM'\n";
    let file = std::env::temp_dir().join(format!("kvm-ops-plan-{}", std::process::id()));
    std::fs::write(&file, PLAN).expect("a plan");
    let variables = [("KVM_OPS_INJECT", &*file)];
    let name = "a_plan_of_faults_reaches_the_program";
    let log = again_with(name, "amd", &variables);
    std::fs::remove_file(&file).expect("our plan");
    if let Some(log) = log {
        let lines = log.lines().filter(|line| line.contains("KVM_CREATE_VM"));
        assert_eq!(
            lines
                .filter(|line| line.ends_with("= -1 ENOMEM (injected)"))
                .count(),
            1
        );
        return;
    }
    let kvm = kvm();
    let made = [0; 3].map(|kind| call(&kvm, ioctl::KVM_CREATE_VM, kind).err());
    assert_eq!(made, [None, Some(Errno::ENOMEM), None]);
}

/// A thread that runs a vCPU until it is cancelled, which unwinds it.
extern "C-unwind" fn run_vcpu(fd: *mut c_void) -> *mut c_void {
    unsafe extern "C-unwind" {
        fn ioctl(fd: c_int, request: libc::c_ulong, ...) -> c_int;
        fn pthread_setcanceltype(kind: c_int, old: *mut c_int) -> c_int;
    }
    /// Wherever the thread is.
    const PTHREAD_CANCEL_ASYNCHRONOUS: c_int = 1;
    let mut old = 0;
    // SAFETY: the place of the old kind is ours. Nothing is to be dropped when the thread is cancelled.
    unsafe { pthread_setcanceltype(PTHREAD_CANCEL_ASYNCHRONOUS, &raw mut old) };
    // SAFETY: no memory is passed.
    unsafe { ioctl(fd as c_int, ioctl::KVM_RUN.number().into(), 0u64) };
    fd
}

#[test]
fn a_thread_that_is_cancelled_in_a_run_leaves_the_vcpu_to_others() {
    if !inside("a_thread_that_is_cancelled_in_a_run_leaves_the_vcpu_to_others") {
        return;
    }
    // again: inc byte [0x2000]; jmp again
    let (vm, vcpu, _code, run) = guest(&[0xfe, 0x06, 0x00, 0x20, 0xeb, 0xfa]);
    let data = page(std::ptr::null_mut(), RW);
    slot(&vm, 1, 0x2000, data);
    // SAFETY: `pthread_create` takes a function that does not unwind by its type alone: cancelling is how threads unwind.
    let start = unsafe {
        std::mem::transmute::<
            extern "C-unwind" fn(*mut c_void) -> *mut c_void,
            extern "C" fn(*mut c_void) -> *mut c_void,
        >(run_vcpu)
    };
    let (mut thread, mut left) = (0, std::ptr::null_mut());
    let fd = vcpu.as_raw_fd() as *mut c_void;
    // SAFETY: the attributes may be null, and the place of the thread is ours.
    let made = unsafe { libc::pthread_create(&raw mut thread, std::ptr::null(), start, fd) };
    assert_eq!(made, 0);
    // SAFETY: the page stays, here and below.
    while unsafe { data.read_volatile() } == 0 {
        std::thread::yield_now();
    }
    // SAFETY: the thread was made, and is joined once.
    unsafe {
        assert_eq!(libc::pthread_cancel(thread), 0);
        assert_eq!(libc::pthread_join(thread, &raw mut left), 0);
    }
    // PTHREAD_CANCELED
    assert_eq!(left as isize, -1);
    // SAFETY: the mapping of the run page stays; the byte is immediate_exit.
    unsafe { run.add(1).write_volatile(1) };
    assert_eq!(call(&vcpu, ioctl::KVM_RUN, 0), Err(Errno::EINTR));
}

/// A page at an address of the system's choice, or in place of another.
fn page(at: *mut u8, prot: c_int) -> *mut u8 {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let flags = if at.is_null() {
        flags
    } else {
        flags | libc::MAP_FIXED
    };
    // SAFETY: a new mapping, or one in place of a page of the test's.
    let page = unsafe { libc::mmap(at.cast(), 0x1000, prot, flags, -1, 0) };
    assert_ne!(page, libc::MAP_FAILED);
    page.cast()
}

/// A slot over a page.
fn slot(vm: &OwnedFd, number: u32, gpa: u64, page: *mut u8) {
    let region = UserspaceMemoryRegion {
        slot: U32::new(number),
        guest_phys_addr: U64::new(gpa),
        memory_size: U64::new(0x1000),
        userspace_addr: U64::new(page as u64),
        ..UserspaceMemoryRegion::default()
    };
    let set = call(
        vm,
        ioctl::KVM_SET_USER_MEMORY_REGION,
        &raw const region as u64,
    );
    assert_eq!(set, Ok(0));
}

const RW: c_int = libc::PROT_READ | libc::PROT_WRITE;

/// A normal VM whose vCPU starts code at 0x1000 in real mode: the VM, the vCPU, the page of the code, and the run page.
fn guest(code: &[u8]) -> (OwnedFd, OwnedFd, *mut u8, *mut u8) {
    let vm = make(&kvm(), ioctl::KVM_CREATE_VM, 0);
    let at = page(std::ptr::null_mut(), RW);
    // SAFETY: the page has so many bytes, and nothing else refers to them.
    unsafe { at.copy_from(code.as_ptr(), code.len()) };
    slot(&vm, 0, 0x1000, at);
    let vcpu = make(&vm, ioctl::KVM_CREATE_VCPU, 0);
    let run = map(&vcpu, MMAP_SIZE, libc::MAP_SHARED).expect("a run page");
    let mut sregs = Sregs::default();
    let got = call(&vcpu, ioctl::KVM_GET_SREGS, &raw mut sregs as u64);
    (sregs.cs.base, sregs.cs.selector) = (U64::ZERO, U16::ZERO);
    let set = call(&vcpu, ioctl::KVM_SET_SREGS, &raw const sregs as u64);
    assert_eq!((got, set), (Ok(0), Ok(0)));
    let regs = Regs {
        rip: U64::new(0x1000),
        rflags: U64::new(2),
        ..Regs::default()
    };
    let regs_at = &raw const regs as u64;
    assert_eq!(call(&vcpu, ioctl::KVM_SET_REGS, regs_at), Ok(0));
    (vm, vcpu, at, run)
}

/// A program that takes memory from its guest gets what the kernel tells it then, and lives.
#[test]
fn memory_that_is_taken_away_under_a_slot_is_efault() {
    if !inside("memory_that_is_taken_away_under_a_slot_is_efault") {
        return;
    }
    // mov al, [0x2000]; out 0x80, al; jmp back
    const CODE: [u8; 7] = [0xa0, 0x00, 0x20, 0xe6, 0x80, 0xeb, 0xf9];
    let (vm, vcpu, _code, run) = guest(&CODE);
    let data = page(std::ptr::null_mut(), RW);
    slot(&vm, 1, 0x2000, data);
    let reads = |value: u8| {
        assert_eq!(call(&vcpu, ioctl::KVM_RUN, 0), Ok(0));
        // SAFETY: the mapping of the run page stays.
        let byte = unsafe { run.add(PIO_PAGE as usize * 0x1000).read_volatile() };
        assert_eq!(byte, value);
    };
    let faults = || {
        for _ in 0..2 {
            assert_eq!(call(&vcpu, ioctl::KVM_RUN, 0), Err(Errno::EFAULT));
            // SAFETY: as above.
            let reason = unsafe { run.add(8).cast::<u32>().read_volatile() };
            assert_eq!(reason, exit_reason::MEMORY_FAULT);
        }
    };
    let place = data.cast::<c_void>();
    reads(0);
    // SAFETY: nothing refers to the page, here and below.
    assert_eq!(unsafe { libc::munmap(place, 0x1000) }, 0);
    faults();
    page(data, RW);
    reads(0);
    // SAFETY: as above.
    assert_eq!(unsafe { libc::mprotect(place, 0x1000, libc::PROT_NONE) }, 0);
    faults();
    // SAFETY: as above.
    assert_eq!(unsafe { libc::mprotect(place, 0x1000, RW) }, 0);
    // SAFETY: the page is there again.
    unsafe { data.write_volatile(9) };
    reads(9);
    page(data, libc::PROT_NONE);
    faults();
    page(data, RW);
    reads(0);
    // SAFETY: as above.
    let moved = unsafe {
        libc::mremap(
            place,
            0x1000,
            0x1000,
            libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED,
            page(std::ptr::null_mut(), RW),
        )
    };
    assert_ne!(moved, libc::MAP_FAILED);
    faults();
}

#[test]
fn the_programs_own_cpuid_tells_of_the_machines_memory_encryption() {
    if !inside("the_programs_own_cpuid_tells_of_the_machines_memory_encryption") {
        return;
    }
    let leaf = |function: u32| {
        let leaf = std::arch::x86_64::__cpuid_count(function, 0);
        [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx]
    };
    const ENCRYPTION: u32 = 0x8000_001f;
    let real = [0, 0x8000_0001].map(leaf);
    let kvm = kvm();
    let mut list = vec![0u32; 2 + 100 * 10];
    list[0] = 100;
    call(
        &kvm,
        ioctl::KVM_GET_SUPPORTED_CPUID,
        list.as_mut_ptr() as u64,
    )
    .expect("the list");
    let entry = list[2..]
        .chunks_exact(10)
        .find(|entry| entry[0] == ENCRYPTION);
    let entry = entry.expect("the leaf");
    assert_eq!(leaf(ENCRYPTION), entry[3..7], "EAX to EDX");
    assert_ne!(entry[4] & 0x3f, 0, "the C-bit");
    assert!(leaf(0x8000_0000)[0] >= ENCRYPTION);
    assert_eq!(
        [0, 0x8000_0001].map(leaf),
        real,
        "else the real processor's"
    );
}

#[test]
fn the_ring_of_coalesced_writes_is_one_in_the_mappings_of_all_vcpus() {
    if !inside("the_ring_of_coalesced_writes_is_one_in_the_mappings_of_all_vcpus") {
        return;
    }
    const PAGE: usize = 4096;
    let ring = COALESCED_MMIO_PAGE as usize * PAGE;
    let kvm = kvm();
    let vms = [0, 0].map(|kind| make(&kvm, ioctl::KVM_CREATE_VM, kind));
    let vcpus =
        [(0, 0), (0, 1), (0, 2), (1, 0)].map(|(vm, id)| make(&vms[vm], ioctl::KVM_CREATE_VCPU, id));
    let mapped = vcpus
        .each_ref()
        .map(|vcpu| map(vcpu, MMAP_SIZE, libc::MAP_SHARED).unwrap());
    // SAFETY: the offsets are in the mappings, which stay, and nobody else writes there.
    unsafe { mapped[1].add(ring).write_volatile(7) };
    // SAFETY: as above.
    unsafe { mapped[1].add(PAGE).write_volatile(9) };
    for (n, at) in mapped.into_iter().enumerate() {
        // SAFETY: as above.
        let (first, port_data) =
            unsafe { (at.add(ring).read_volatile(), at.add(PAGE).read_volatile()) };
        assert_eq!((first == 7, port_data == 9), (n < 3, n == 1), "{n}");
    }
    // SAFETY: a new mapping of the ring's page alone, which is read once.
    let alone = unsafe {
        let at = libc::mmap(
            std::ptr::null_mut(),
            PAGE,
            libc::PROT_READ,
            libc::MAP_SHARED,
            vcpus[2].as_raw_fd(),
            ring as libc::off_t,
        );
        assert_ne!(at, libc::MAP_FAILED);
        at.cast::<u8>().read_volatile()
    };
    assert_eq!(alone, 7);
}
