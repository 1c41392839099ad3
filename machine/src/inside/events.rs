//! Events that guests' writes signal: those of the kernel, and those that the run loop does in their place.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};

use kvm_ops::{DevicePort, Error, Field, HostEvent, IoEvent, IoEventMatch, Result};

/// A counter in this process.
#[derive(Default)]
struct SoftEvent {
    count: Mutex<u64>,
    changed: Condvar,
}

impl SoftEvent {
    fn count(&self) -> MutexGuard<'_, u64> {
        self.count.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl HostEvent for SoftEvent {
    fn signal(&self) -> Result<()> {
        let mut count = self.count();
        *count = count.saturating_add(1);
        self.changed.notify_all();
        Ok(())
    }

    fn wait(&self) -> Result<u64> {
        let mut count = self
            .changed
            .wait_while(self.count(), |count| *count == 0)
            .unwrap_or_else(PoisonError::into_inner);
        Ok(std::mem::take(&mut *count))
    }

    fn take(&self) -> Result<u64> {
        Ok(std::mem::take(&mut *self.count()))
    }
}

/// An event as the table holds it: the owners are the devices.
struct Entry {
    at: IoEvent,
    matching: IoEventMatch,
    event: Weak<dyn HostEvent>,
    /// True if the run loop signals it.
    soft: bool,
}

/// The events of a machine.
#[derive(Default)]
pub(crate) struct Events {
    table: Mutex<Vec<Entry>>,
    /// The number of soft ones, so that a machine without pays nothing for an exit.
    soft: AtomicUsize,
    ending: AtomicBool,
}

impl Events {
    fn table(&self) -> MutexGuard<'_, Vec<Entry>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes an event: the kernel's if it has such, else a soft one.
    pub(crate) fn add(
        &self,
        port: Option<&dyn DevicePort>,
        at: IoEvent,
        matching: IoEventMatch,
    ) -> Result<Arc<dyn HostEvent>> {
        let made = match port.map(|port| port.io_event(at, matching)) {
            None | Some(Err(Error::NotOffered(_) | Error::HostLacks(_))) => None,
            Some(made) => Some(made?),
        };
        let soft = made.is_none();
        let mut table = self.table();
        table.retain(|entry| entry.event.strong_count() != 0);
        if soft && table.iter().any(|e| (e.at, e.matching) == (at, matching)) {
            return Err(match at {
                IoEvent::Port(port) => Error::Exists(Field::Port, port.into()),
                IoEvent::Mmio(gpa) => Error::Exists(Field::Gpa, gpa.get()),
            });
        }
        let event = made.unwrap_or_else(|| Arc::new(SoftEvent::default()));
        table.push(Entry {
            at,
            matching,
            event: Arc::downgrade(&event),
            soft,
        });
        let count = table.iter().filter(|entry| entry.soft).count();
        self.soft.store(count, Ordering::Release);
        Ok(event)
    }

    /// Signals the soft event that a write is for. False if there is none: the write is the handler's.
    pub(crate) fn written(&self, at: IoEvent, data: &[u8]) -> bool {
        if self.soft.load(Ordering::Acquire) == 0 {
            return false;
        }
        let event = self
            .table()
            .iter()
            .filter(|entry| entry.soft && entry.at == at && entry.matching.matches(data))
            .find_map(|entry| entry.event.upgrade());
        event.is_some_and(|event| event.signal().is_ok())
    }

    /// A run begins.
    pub(crate) fn begin(&self) {
        self.ending.store(false, Ordering::SeqCst);
    }

    /// The run ends: whoever waits for an event wakes and finds it out.
    pub(crate) fn end(&self) {
        self.ending.store(true, Ordering::SeqCst);
        let events: Vec<_> = self
            .table()
            .iter()
            .filter_map(|e| e.event.upgrade())
            .collect();
        for event in events {
            if let Err(error) = event.signal() {
                tracing::error!(%error, "an event was not signalled at the end of a run");
            }
        }
    }

    pub(crate) fn is_ending(&self) -> bool {
        self.ending.load(Ordering::SeqCst)
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use kvm_ops::Gpa;

    use super::*;

    const BELL: IoEvent = IoEvent::Mmio(Gpa::new(0xd000_0050));

    #[test]
    fn a_write_signals_the_event_of_its_place_width_and_value_only() {
        let events = Events::default();
        let zero = events.add(None, BELL, IoEventMatch::U32(0)).unwrap();
        let port = events
            .add(None, IoEvent::Port(0x80), IoEventMatch::Any)
            .unwrap();
        assert!(events.written(BELL, &[0; 4]));
        assert!(events.written(BELL, &[0; 4]));
        for (at, data) in [
            (BELL, &[0; 2][..]),
            (BELL, &[1, 0, 0, 0]),
            (IoEvent::Port(0x81), &[0]),
        ] {
            assert!(!events.written(at, data), "{at:?} {data:?}");
        }
        assert!(events.written(IoEvent::Port(0x80), &[9]));
        assert_eq!(
            (zero.wait(), zero.take(), port.take()),
            (Ok(2), Ok(0), Ok(1))
        );
        assert_eq!(zero.raw_fd(), None);
    }

    #[test]
    fn a_place_has_one_event_until_its_last_handle_is_gone() {
        let events = Events::default();
        let event = events.add(None, BELL, IoEventMatch::Any).unwrap();
        let again = events.add(None, BELL, IoEventMatch::Any).err();
        assert_eq!(again, Some(Error::Exists(Field::Gpa, 0xd000_0050)));
        drop(event);
        assert!(!events.written(BELL, &[1]));
        events.add(None, BELL, IoEventMatch::Any).unwrap();
    }

    #[test]
    fn the_end_of_a_run_wakes_who_waits() {
        let events = Events::default();
        let event = events.add(None, BELL, IoEventMatch::Any).unwrap();
        thread::scope(|scope| {
            let worker = scope.spawn(|| (event.wait(), events.is_ending()));
            events.end();
            assert_eq!(worker.join().unwrap(), (Ok(1), true));
        });
        events.begin();
        assert!(!events.is_ending());
    }
}
