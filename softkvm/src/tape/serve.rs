//! The answer of a call: what the record's kernel wrote, made and signalled.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use kvm_ops_uapi::Errno;
use kvm_ops_uapi::ioctl::KVM_RUN;

use super::canon;
use super::fields::slot_set;
use super::format::{Answer, Call, NewFile, Step};
use super::play::{Inner, Mismatch, Played, Player};
use super::record::page;
use crate::refusal::Result;
use crate::{File, FileKind, Process, RunArea};

/// The time between two questions for a signal.
const ASK: Duration = Duration::from_millis(1);
/// The place of `immediate_exit` in the run page.
const IMMEDIATE_EXIT: u64 = 1;

impl Inner {
    /// Compares a call, waits for its turn, and gives the record's answer.
    pub(super) fn answer(
        &self,
        file: &Played,
        player: &Player,
        process: &dyn Process,
        (number, argument): (u32, u64),
    ) -> Result<Result<i64>, Mismatch> {
        let fits = |call: &Call| self.fits(call, file, process, (number, argument));
        let (n, bases) = self.claim(fits)?;
        let call = &self.calls[n];
        let area = (number == KVM_RUN.number())
            .then(|| file.run_area())
            .flatten();
        self.turn(n)?;
        if let (Some(area), Answer::Errno(errno)) = (area, call.answer)
            && Errno(errno) == Errno::EINTR
        {
            self.interrupted(n, area.as_ref())?;
        }
        let fail = |why: &str| self.mismatch(n, why.to_owned());
        let mut made = None;
        for step in &call.steps {
            match step {
                Step::Write(place, canon) => {
                    let Some(address) = bases.resolve(place) else {
                        return Err(fail("the record writes where nothing leads"));
                    };
                    let mut there = vec![0; canon.len()];
                    // What cannot be read is not written over with its own bytes.
                    let _ = process.read(address, &mut there);
                    let bytes = canon::restored(&bases, place, canon, &there);
                    if process.write(address, &bytes).is_err() {
                        return Err(fail("an answer cannot be written"));
                    }
                }
                Step::New(own, new) => {
                    let made_now = self.make((player, file), process, (*own, *new));
                    made = Some(made_now.ok_or_else(|| fail("there is no descriptor left"))?);
                }
                Step::Event(own, at) => self.open_event(process, argument, (*own, *at)),
                Step::PageOut(at, bytes) => {
                    if let Some(area) = area {
                        area.write(*at as u64, bytes);
                    }
                }
                Step::Memory(slot, at, bytes) => self.put(process, (*slot, *at), bytes),
                Step::Signal(own) => {
                    if let Some(event) = self.lock().events.get(own) {
                        event.signal();
                    }
                }
                Step::Clock(..)
                | Step::Lock(..)
                | Step::PageIn(..)
                | Step::Read(..)
                | Step::ReadFault(..)
                | Step::WriteFault(..) => {}
            }
        }
        if let Some(area) = area {
            self.lock().pages.insert(file.number, page(area.as_ref()));
        }
        if !matches!(call.answer, Answer::Errno(_))
            && let Some((_, address, bytes)) = slot_set(process, (number, argument))
        {
            self.lock().slots.push((address, bytes));
        }
        let answer = match (call.answer, made) {
            (Answer::Errno(errno), _) => Err(Errno(errno).into()),
            (Answer::File(_), Some(descriptor)) => Ok(descriptor.into()),
            (Answer::File(_), None) => return Err(fail("the record has no such file")),
            (Answer::Value(value), _) => Ok(value),
        };
        self.done(n);
        Ok(answer)
    }

    /// Makes the file of a call. `None` without a free descriptor.
    fn make(
        &self,
        (player, maker): (&Player, &Played),
        process: &dyn Process,
        (number, new): (u32, NewFile),
    ) -> Option<i32> {
        let descriptor = process.reserve().ok()?;
        let area = match new {
            NewFile::Vcpu => match self.run_area(process, maker.number) {
                Ok(area) => Some(area),
                Err(_) => {
                    process.release(descriptor);
                    return None;
                }
            },
            _ => None,
        };
        let (kind, gmem) = match new {
            NewFile::Vm => (FileKind::Vm, None),
            NewFile::Vcpu => (FileKind::Vcpu, None),
            NewFile::Stats => (FileKind::Stats, None),
            NewFile::GuestMemfd { size, flags } => (FileKind::GuestMemfd, Some((size, flags))),
        };
        let file = File::played(Played {
            player: player.clone(),
            number,
            kind,
            gmem,
            area,
        });
        process.install(descriptor, file);
        Some(descriptor)
    }

    /// The run area of a VM's new vCPU, which has a page in common with the others.
    fn run_area(&self, process: &dyn Process, vm: u32) -> Result<Arc<dyn RunArea>, Errno> {
        let first = self.lock().first_areas.get(&vm).cloned();
        let area = process.run_area(first.as_deref())?;
        if first.is_none() {
            self.lock().first_areas.insert(vm, Arc::clone(&area));
        }
        Ok(area)
    }

    /// Keeps the eventfd that a field of the argument names, if the guest signals it later.
    fn open_event(&self, process: &dyn Process, argument: u64, (own, at): (u32, usize)) {
        if !self.signalled.contains(&own) {
            return;
        }
        let mut number = [0; 4];
        let read = process.read(argument.wrapping_add(at as u64), &mut number);
        let event = read
            .ok()
            .and_then(|()| process.eventfd(i32::from_le_bytes(number)).ok());
        if let Some(event) = event {
            self.lock().events.insert(own, event);
        }
    }

    /// Writes what the guest wrote into the memory of a slot.
    fn put(&self, process: &dyn Process, (slot, at): (u32, u64), bytes: &[u8]) {
        let found = self.lock().slots.get(slot as usize).copied();
        let Some((address, len)) = found else { return };
        let end = at.checked_add(bytes.len() as u64);
        if end.is_some_and(|end| end <= len)
            && process.write(address.wrapping_add(at), bytes).is_err()
        {
            tracing::warn!(slot, at, "memory of the guest is gone");
        }
    }

    /// Waits for what ended a run: a signal, or the program's `immediate_exit`.
    fn interrupted(&self, call: usize, area: &dyn RunArea) -> Result<(), Mismatch> {
        let late = Instant::now() + self.patience;
        let is_asked = || {
            let mut immediate = [0];
            area.read(IMMEDIATE_EXIT, &mut immediate);
            immediate[0] != 0 || area.signal_pending()
        };
        while !is_asked() {
            if Instant::now() >= late || self.lock().stopped {
                let got = "no signal came that ends the run".to_owned();
                return Err(self.mismatch(call, got));
            }
            thread::sleep(ASK);
        }
        Ok(())
    }
}
