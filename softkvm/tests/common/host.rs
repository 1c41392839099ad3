//! A process whose memory is real, so that it can be lent to guests.
#![allow(dead_code)] // Each test uses some of it.

use std::alloc::Layout;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex};

use kvm_ops::{HostRange, volatile};
use kvm_ops_softkvm::{
    AddressSpace, Descriptor, EventFd, Fault, File, FileMemory, PinLimits, Process, Refusal,
    RunArea, Task,
};
use kvm_ops_uapi::ioctl::{self, Ioctl};
use kvm_ops_uapi::state::{Regs, Segment, Sregs};
use kvm_ops_uapi::{Errno, U32, U64};

const PAGE: u64 = 4096;

/// Pages that are zero at first.
pub(crate) struct Pages(HostRange);

impl Pages {
    pub(crate) fn new(bytes: u64) -> Arc<Self> {
        let layout = Layout::from_size_align(bytes as usize, PAGE as usize).unwrap();
        // SAFETY: the length is not zero, or `HostRange` would refuse it below.
        let at = NonNull::new(unsafe { std::alloc::alloc_zeroed(layout) }).unwrap();
        // SAFETY: the pages stay until the value is dropped, which slots with them keep, or the process
        // that outlives its VMs; and they are only touched by volatile copies.
        Arc::new(Self(
            unsafe { HostRange::new(at.as_ptr() as u64, bytes) }.unwrap(),
        ))
    }

    pub(crate) fn address(&self) -> u64 {
        self.0.address()
    }

    /// The bytes from an address of the process on, if they are all here.
    fn place(&self, address: u64, len: usize) -> Option<*mut u8> {
        let offset = address.checked_sub(self.address())?;
        let end = offset.checked_add(len as u64)?;
        (end <= self.0.bytes()).then_some(address as *mut u8)
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        let layout = Layout::from_size_align(self.0.bytes() as usize, PAGE as usize).unwrap();
        // SAFETY: allocated so in `new`, and nothing has it any more.
        unsafe { std::alloc::dealloc(self.address() as *mut u8, layout) };
    }
}

impl FileMemory for Pages {
    fn range(&self) -> HostRange {
        self.0
    }
}

/// Guest_memfds with their memory.
type Files = Vec<(File, Arc<Pages>)>;

/// The process.
pub(crate) struct Host {
    pub(crate) task: Task,
    memory: Mutex<Vec<Arc<Pages>>>,
    /// Those that were lent, which the process keeps. `None`: it lends no file.
    files: Option<Mutex<Files>>,
}

impl Host {
    pub(crate) fn new() -> Self {
        Self {
            task: Task::new(),
            memory: Mutex::default(),
            files: Some(Mutex::default()),
        }
    }

    /// A process that lends no file, so that each ends with its last number.
    pub(crate) fn without_files() -> Self {
        Self {
            files: None,
            ..Self::new()
        }
    }

    /// Maps memory, for as long as the process lives.
    pub(crate) fn map(&self, bytes: u64) -> u64 {
        let pages = Pages::new(bytes);
        let at = pages.address();
        self.memory.lock().unwrap().push(pages);
        at
    }

    /// Gives memory back, of which no guest has a part any more.
    pub(crate) fn unmap(&self, address: u64) {
        let stays = |pages: &Arc<Pages>| pages.address() != address;
        self.memory.lock().unwrap().retain(stays);
    }

    pub(crate) fn ioctl(&self, fd: i32, ioctl: Ioctl, argument: u64) -> Result<i64, Refusal> {
        self.task.file(fd)?.ioctl(self, ioctl.number(), argument)
    }

    /// Starts a vCPU in real mode, with flat segments and a stack below 0x1000.
    pub(crate) fn real_mode(&self, vcpu: i32, start: u64) -> Result<(), Refusal> {
        let data = Segment {
            limit: U32::new(0xffff),
            kind: 3,
            present: 1,
            s: 1,
            ..Segment::default()
        };
        let at = self.task.map(size_of::<Sregs>());
        self.ioctl(vcpu, ioctl::KVM_GET_SREGS, at)?;
        let mut sregs: Sregs = self.task.get(at)?;
        (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
        sregs.cs = Segment { kind: 11, ..data };
        let at = self.task.put(&sregs);
        self.ioctl(vcpu, ioctl::KVM_SET_SREGS, at)?;
        let regs = Regs {
            rip: U64::new(start),
            rsp: U64::new(0x0ff0),
            rflags: U64::new(2),
            ..Regs::default()
        };
        let at = self.task.put(&regs);
        self.ioctl(vcpu, ioctl::KVM_SET_REGS, at)?;
        Ok(())
    }

    /// The memory of a guest_memfd.
    pub(crate) fn file_pages(&self, number: i32) -> Option<Arc<Pages>> {
        let file = self.task.file(number).ok()?;
        let (size, _) = file.guest_memfd()?;
        let mut files = self.files.as_ref()?.lock().unwrap();
        if let Some((_, pages)) = files.iter().find(|(known, _)| known.is_same(&file)) {
            return Some(Arc::clone(pages));
        }
        let pages = Pages::new(size);
        files.push((file, Arc::clone(&pages)));
        Some(pages)
    }

    fn place(&self, address: u64, len: usize) -> Option<*mut u8> {
        let memory = self.memory.lock().unwrap();
        memory.iter().find_map(|pages| pages.place(address, len))
    }
}

impl Process for Host {
    fn address_space(&self) -> AddressSpace {
        self.task.address_space()
    }

    fn pin_limits(&self) -> PinLimits {
        self.task.pin_limits()
    }

    fn read(&self, address: u64, into: &mut [u8]) -> Result<(), Fault> {
        match self.place(address, into.len()) {
            // SAFETY: the bytes are in pages of this process, which it keeps.
            Some(at) => unsafe { volatile::copy_from(at, into) },
            None => self.task.read(address, into)?,
        }
        Ok(())
    }

    fn write(&self, address: u64, bytes: &[u8]) -> Result<(), Fault> {
        match self.place(address, bytes.len()) {
            // SAFETY: as above.
            Some(at) => unsafe { volatile::copy_to(at, bytes) },
            None => self.task.write(address, bytes)?,
        }
        Ok(())
    }

    fn descriptor(&self, number: i32) -> Descriptor {
        self.task.descriptor(number)
    }

    fn reserve(&self) -> Result<i32, Errno> {
        self.task.reserve()
    }

    fn install(&self, number: i32, file: File) {
        self.task.install(number, file);
    }

    fn release(&self, number: i32) {
        self.task.release(number);
    }

    fn eventfd(&self, number: i32) -> Result<Arc<dyn EventFd>, Errno> {
        self.task.eventfd(number)
    }

    fn run_area(&self, other: Option<&dyn RunArea>) -> Result<Arc<dyn RunArea>, Errno> {
        self.task.run_area(other)
    }

    fn signal_pending(&self) -> bool {
        self.task.signal_pending()
    }

    fn lend(&self, address: u64, bytes: u64, _writable: bool) -> Option<HostRange> {
        self.place(address, bytes as usize)?;
        // SAFETY: the range is in pages of this process, which outlives its VMs in each test.
        unsafe { HostRange::new(address, bytes) }.ok()
    }

    fn lend_file(&self, number: i32, offset: u64, bytes: u64) -> Option<Arc<dyn FileMemory>> {
        struct Part(
            HostRange,
            #[expect(dead_code, reason = "keeps the range")] Arc<Pages>,
        );
        impl FileMemory for Part {
            fn range(&self) -> HostRange {
                self.0
            }
        }
        let pages = self.file_pages(number)?;
        Some(Arc::new(Part(pages.0.part(offset, bytes)?, pages)))
    }
}
