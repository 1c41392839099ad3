//! Records what a program asks, and what it gets.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io::Write;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::{self, ThreadId};
use std::time::Duration;

use kvm_ops_uapi::ioctl::KVM_RUN;
use kvm_ops_uapi::run::MMAP_SIZE;

use super::canon;
use super::fields::slot_set;
use super::format::{Answer, Call, Device, LOST, Machine, Step, Vendor, What, changes, head};
use super::memory::{Change, Slots};
use super::order::Taken;
use super::places::Bases;
use super::traced::{SIGNALLED, Traced, Traces};
use crate::refusal::Result;
use crate::vm::Vm;
use crate::{File, Process, RunArea};

/// Writes each call of a program to a record, as soon as it is answered.
pub(crate) struct Recorder {
    vendor: Vendor,
    state: Mutex<State>,
}

pub(super) struct State {
    out: Option<Box<dyn Write + Send>>,
    /// Numbers of open files by their identity. One that was closed is replaced by the next with its identity.
    files: HashMap<usize, u32>,
    next_file: u32,
    /// The file whose call made a file: that of the VM for a vCPU's.
    pub(super) makers: HashMap<u32, u32>,
    /// The VM of each VM's file.
    alive: HashMap<u32, Weak<Vm>>,
    /// The run page of each vCPU's file, as its last run left it.
    pages: HashMap<u32, Vec<u8>>,
    threads: HashMap<ThreadId, u32>,
    /// What clocks told each of these threads since its last call.
    pub(super) looks: HashMap<ThreadId, Vec<Step>>,
    pub(super) taken: HashMap<String, Taken>,
    pub(super) events: u32,
    slots: Slots,
    /// The calls of each VM's file's vCPUs that run now.
    runs: HashMap<u32, u32>,
}

impl Recorder {
    pub(super) fn new(machine: Machine, mut out: Box<dyn Write + Send>) -> std::io::Result<Self> {
        out.write_all(head(machine).as_bytes())?;
        Ok(Self {
            vendor: machine.vendor,
            state: Mutex::new(State {
                out: Some(out),
                files: HashMap::new(),
                next_file: 0,
                makers: HashMap::new(),
                alive: HashMap::new(),
                pages: HashMap::new(),
                threads: HashMap::new(),
                looks: HashMap::new(),
                taken: HashMap::new(),
                events: 0,
                slots: Slots::default(),
                runs: HashMap::new(),
            }),
        })
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A device was opened.
    pub(crate) fn opened(&self, file: &File, device: Device) {
        let mut state = self.lock();
        if state.has_ended() {
            return;
        }
        let number = state.name(file);
        let looks = state.take_looks();
        state.write(What::Open(device, number), looks, Answer::File(number));
    }

    /// A clock told the calling thread a time, which counts once the thread has made a call.
    pub(crate) fn looked(&self, clock: i32, time: Duration) {
        let mut state = self.lock();
        if let Some(looks) = state.looks.get_mut(&thread::current().id()) {
            looks.push(Step::Clock(clock, time));
        }
    }

    /// Records a call that `serve` answers.
    pub(crate) fn ioctl(
        &self,
        file: &File,
        process: &dyn Process,
        (number, argument): (u32, u64),
        serve: impl FnOnce(&dyn Process) -> Result<i64>,
    ) -> Result<i64> {
        let run = file.run_area().filter(|_| number == KVM_RUN.number());
        let slot = slot_set(process, (number, argument));
        let (own, before, steps) = {
            let mut state = self.lock();
            if state.has_ended() {
                drop(state);
                return serve(process);
            }
            let mut steps = state.take_looks();
            let own = state.number(file);
            let before = run.map(|area| state.before_run(own, process, area.as_ref(), &mut steps));
            if let Some(slot) = slot {
                let runs = state.is_running(own);
                state.slots.begin(own, slot, process, runs);
            }
            (own, before, steps)
        };
        let traced = Traced {
            inner: process,
            recorder: self,
            call: RefCell::new(Traces {
                bases: Bases::new(self.vendor, number, argument),
                steps,
                written: Vec::new(),
                lost: None,
            }),
            maker: own,
        };
        SIGNALLED.with_borrow_mut(Vec::clear);
        let answer = serve(&traced);
        let Traces {
            mut steps, lost, ..
        } = traced.call.into_inner();
        // Kept from the look at the memory until it is written down: of two vCPUs the one that looks first comes first.
        let mut state = self.lock();
        if let (Some(area), Some(before)) = (run, before) {
            state.after_run(own, process, area.as_ref(), &before, &mut steps);
        }
        match slot {
            Some(slot) if answer.is_ok() => {
                let runs = state.is_running(own);
                let left = state.slots.set(own, slot, process, runs);
                steps.extend(left.into_iter().map(memory));
            }
            Some(_) => state.slots.refused(),
            None => {}
        }
        if let Some(address) = lost {
            state.give_up(number, address);
        }
        let what = What::ioctl(own, (number, argument));
        let made = steps.iter().rev().find_map(|step| match step {
            Step::New(file, _) => Some(*file),
            _ => None,
        });
        let end = match (&answer, made) {
            (Ok(_), Some(file)) => Answer::File(file),
            (Ok(value), None) => Answer::Value(*value),
            (Err(refusal), _) => Answer::Errno(refusal.errno().0),
        };
        state.write(what, steps, end);
        answer
    }
}

/// The step of a change in a slot.
fn memory((slot, at, bytes): Change) -> Step {
    Step::Memory(slot, at, bytes)
}

/// The contents of the memory that a vCPU shares.
pub(super) fn page(area: &dyn RunArea) -> Vec<u8> {
    let mut page = vec![0; MMAP_SIZE as usize];
    area.read(0, &mut page);
    page
}

impl State {
    /// Gives a new file its number.
    pub(super) fn name(&mut self, file: &File) -> u32 {
        let number = self.next_file;
        self.next_file += 1;
        self.files.insert(file.identity(), number);
        number
    }

    /// Gives the new file of a call its number.
    pub(super) fn name_made(&mut self, file: &File, maker: u32) -> u32 {
        let number = self.name(file);
        self.makers.insert(number, maker);
        if let Some(vm) = file.as_vm() {
            self.forget_ended();
            self.alive.insert(number, Arc::downgrade(vm));
        }
        number
    }

    /// Drops what was kept for VMs that ended.
    fn forget_ended(&mut self) {
        let ended = self.alive.extract_if(|_, vm| vm.strong_count() == 0);
        for (vm, _) in ended {
            self.slots.forget(vm);
            self.runs.remove(&vm);
            for (file, _) in self.makers.extract_if(|_, maker| *maker == vm) {
                self.pages.remove(&file);
            }
        }
    }

    /// The slot that has an address, of the VM behind a file.
    pub(super) fn slot_at(&self, file: u32, address: u64) -> Option<(u32, u64)> {
        let own = self.slots.find(file, address);
        own.or_else(|| self.slots.find(*self.makers.get(&file)?, address))
    }

    pub(super) fn number(&self, file: &File) -> u32 {
        let number = self.files.get(&file.identity());
        number.copied().unwrap_or(canon::FOREIGN)
    }

    /// What clocks told the calling thread, which makes a call.
    fn take_looks(&mut self) -> Vec<Step> {
        let looks = self.looks.entry(thread::current().id()).or_default();
        std::mem::take(looks)
    }

    /// True if a vCPU of the VM behind a file is in a run.
    fn is_running(&self, vm: u32) -> bool {
        self.runs.get(&vm).is_some_and(|runs| *runs != 0)
    }

    /// Notes what the program wrote to the run page, and returns the page.
    fn before_run(
        &mut self,
        own: u32,
        process: &dyn Process,
        area: &dyn RunArea,
        steps: &mut Vec<Step>,
    ) -> Vec<u8> {
        let page = page(area);
        if let Some(vm) = self.makers.get(&own) {
            self.slots.look_at_new(*vm, process);
            *self.runs.entry(*vm).or_default() += 1;
        }
        let seen = self.pages.entry(own);
        let found = changes(seen.or_insert_with(|| vec![0; page.len()]), &page);
        steps.extend(found.into_iter().map(|(at, bytes)| Step::PageIn(at, bytes)));
        page
    }

    /// Notes what the run changed: the run page, memory, and eventfds.
    fn after_run(
        &mut self,
        own: u32,
        process: &dyn Process,
        area: &dyn RunArea,
        before: &[u8],
        steps: &mut Vec<Step>,
    ) {
        let page = page(area);
        let found = changes(before, &page).into_iter();
        steps.extend(found.map(|(at, bytes)| Step::PageOut(at, bytes)));
        if let Some(vm) = self.makers.get(&own) {
            if let Some(runs) = self.runs.get_mut(vm) {
                *runs -= 1;
            }
            let found = self.slots.changes(*vm, process).into_iter();
            steps.extend(found.map(memory));
        }
        let signalled = SIGNALLED.with_borrow_mut(std::mem::take);
        steps.extend(signalled.into_iter().map(Step::Signal));
        self.pages.insert(own, page);
    }

    fn write(&mut self, what: What, steps: Vec<Step>, answer: Answer) {
        let next = self.threads.len() as u32;
        let thread = *self.threads.entry(thread::current().id()).or_insert(next);
        let call = Call {
            thread,
            what,
            steps,
            answer,
        };
        let Some(out) = &mut self.out else { return };
        // One write, so that a program that is killed leaves whole calls.
        if let Err(error) = out.write_all(call.to_string().as_bytes()) {
            tracing::error!(%error, "the record ends here");
            self.end();
        }
    }

    /// A call used memory that nothing in its arguments leads to, so a replay could not find it.
    fn give_up(&mut self, number: u32, address: u64) {
        let Some(out) = &mut self.out else { return };
        let _ = writeln!(out, "{LOST}{number:x} {address:x}");
        tracing::error!(
            number,
            address,
            "the record ends here: memory of unknown origin"
        );
        self.end();
    }

    fn has_ended(&self) -> bool {
        self.out.is_none()
    }

    /// Ends the record, and drops what was kept for it.
    fn end(&mut self) {
        self.out = None;
        self.slots = Slots::default();
        self.pages.clear();
        self.looks.clear();
    }
}

#[cfg(test)]
mod tests {
    use kvm_ops::Vendor;
    use kvm_ops::sim::SimHost;
    use kvm_ops_uapi::U64;
    use kvm_ops_uapi::ioctl;
    use kvm_ops_uapi::memory::UserspaceMemoryRegion;

    use super::*;
    use crate::{Faults, Kernel, Task};

    fn recording(out: impl Write + Send + 'static) -> Kernel {
        let host = SimHost::new(Vendor::Intel);
        Kernel::recording(host, Faults::default(), Box::new(out)).unwrap()
    }

    /// A VM with a slot, and its vCPU after a run. The guest has no code.
    fn ran(kernel: &Kernel, task: &Task) -> (i32, i32) {
        let make = |fd, ioctl| task.ioctl(fd, ioctl, 0).unwrap() as i32;
        let kvm = task.open(kernel.open_kvm()).unwrap();
        let vm = make(kvm, ioctl::KVM_CREATE_VM);
        let slot = UserspaceMemoryRegion {
            memory_size: U64::new(0x1000),
            userspace_addr: U64::new(task.map(0x1000)),
            ..UserspaceMemoryRegion::default()
        };
        task.call(vm, ioctl::KVM_SET_USER_MEMORY_REGION, &slot)
            .unwrap();
        let vcpu = make(vm, ioctl::KVM_CREATE_VCPU);
        let _ = task.ioctl(vcpu, KVM_RUN, 0);
        (vm, vcpu)
    }

    #[test]
    fn what_is_kept_for_a_vm_goes_with_it() {
        let (kernel, task) = (recording(std::io::sink()), Task::new());
        for _ in 0..3 {
            let (vm, vcpu) = ran(&kernel, &task);
            let state = kernel.recorder().unwrap().lock();
            assert_eq!(state.alive.len(), 1);
            assert_eq!((state.slots.count(), state.pages.len()), (1, 1));
            drop(state);
            // A vCPU keeps its VM.
            task.close(vm).unwrap();
            task.close(vcpu).unwrap();
        }
    }

    #[test]
    fn nothing_is_kept_for_a_record_that_has_ended() {
        /// It has room for so many writes.
        struct Room(u32);
        impl Write for Room {
            fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
                assert_ne!(self.0, 0, "a write after one that failed");
                self.0 -= 1;
                match self.0 {
                    0 => Err(std::io::ErrorKind::StorageFull.into()),
                    _ => Ok(bytes.len()),
                }
            }

            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        for room in 2..8 {
            let (kernel, task) = (recording(Room(room)), Task::new());
            ran(&kernel, &task);
            ran(&kernel, &task);
            let state = kernel.recorder().unwrap().lock();
            assert_eq!((state.slots.count(), state.pages.len()), (0, 0), "{room}");
        }
    }
}
