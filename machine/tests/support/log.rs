//! The log of a process, for tests of its lines.

use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

/// The log of the whole process: vCPU threads write into it too.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        lock(&self.0).extend_from_slice(data);
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The lines that `body` logs. One test at a time: there is one log.
pub(crate) fn log_of(body: impl FnOnce()) -> Vec<String> {
    static LOG: OnceLock<Log> = OnceLock::new();
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = lock(&TURN);
    let log = LOG.get_or_init(|| {
        let log = Log::default();
        let writer = log.clone();
        tracing_subscriber::fmt()
            .with_max_level(tracing::Level::TRACE)
            .with_writer(move || writer.clone())
            .with_ansi(false)
            .without_time()
            .with_target(false)
            .init();
        log
    });
    lock(&log.0).clear();
    body();
    let bytes = std::mem::take(&mut *lock(&log.0));
    let text = String::from_utf8(bytes).expect("events are text");
    text.lines()
        .map(|line| line.trim_start().to_owned())
        .collect()
}

/// Finds the parts in one line.
#[track_caller]
pub(crate) fn has(log: &[String], parts: &[&str]) {
    let fits = |line: &&String| parts.iter().all(|part| line.contains(part));
    assert!(
        log.iter().any(|line| fits(&line)),
        "no line with {parts:?} in:\n{}",
        log.join("\n")
    );
}
