//! The console of a guest: standard output, or a part of the report.

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use kvm_ops_machine::Stopper;

/// Standard output as a guest's console. If it is closed, the guest is stopped.
#[derive(Clone)]
pub(super) struct Terminal(Arc<State>);

struct State {
    stopper: Stopper,
    last: AtomicU8,
    closed: AtomicBool,
}

impl Terminal {
    pub(super) fn new(stopper: Stopper) -> Self {
        Self(Arc::new(State {
            stopper,
            last: AtomicU8::new(b'\n'),
            closed: AtomicBool::new(false),
        }))
    }

    /// Returns true if standard output accepts no more data.
    pub(super) fn closed(&self) -> bool {
        self.0.closed.load(Ordering::SeqCst)
    }

    /// Ends a line that the guest has left open.
    pub(super) fn finish(&self) {
        if self.0.last.load(Ordering::SeqCst) != b'\n' && !self.closed() {
            // An error here is ignored: it only loses the line's end.
            let _ = io::stdout()
                .write_all(b"\n")
                .and_then(|()| io::stdout().flush());
        }
    }
}

impl Write for Terminal {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = io::stdout().write(bytes);
        if let (Ok(1..), Some(last)) = (&written, bytes.last()) {
            self.0.last.store(*last, Ordering::SeqCst);
        }
        self.or_stop(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.or_stop(io::stdout().flush())
    }
}

impl Terminal {
    fn or_stop<T>(&self, result: io::Result<T>) -> io::Result<T> {
        match &result {
            Err(error) if error.kind() != io::ErrorKind::Interrupted => {
                self.0.closed.store(true, Ordering::SeqCst);
                self.0.stopper.stop();
            }
            _ => {}
        }
        result
    }
}
