//! Clocks of a program whose run is recorded, or served from a record. A recorded program is told the system's time, and the
//! record what it was told; one that is served from it is told the same again.

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::Duration;

use libc::{c_int, c_void, clockid_t, sem_t, time_t, timespec, timeval};

use crate::behind::behind;
use crate::{locks, own, raw, record};

/// Set once there is a record. Without one nothing here has an effect.
static ON: AtomicBool = AtomicBool::new(false);

/// Clocks that programs read: their numbers are below this.
const CLOCKS: usize = 12;

/// How far each clock of a replay is ahead of the system's, in nanoseconds.
static AHEAD: [AtomicI64; CLOCKS] = [const { AtomicI64::new(0) }; CLOCKS];

thread_local! {
    /// The thread is in a call that the library answers: the clock is the library's own matter.
    static ANSWERS: Cell<bool> = const { Cell::new(false) };
    /// Gone when the thread ends. What it is told then is part of no record.
    static ALIVE: Alive = const { Alive };
}

struct Alive;

impl Drop for Alive {
    fn drop(&mut self) {}
}

/// There is a record from now on.
pub(crate) fn begin() {
    locks::find();
    ON.store(true, Ordering::Release);
}

/// True if there is a record.
pub(crate) fn is_on() -> bool {
    ON.load(Ordering::Acquire)
}

/// True if what the calling thread does now is part of a record.
pub(crate) fn counts() -> bool {
    is_on() && !ANSWERS.get() && !own::is_child() && ALIVE.try_with(|_| ()).is_ok()
}

/// Does something of the library's own, and leaves errno as it is.
pub(crate) fn own_work<T>(work: impl FnOnce() -> T) -> T {
    let (before, errno) = (ANSWERS.replace(true), raw::errno());
    let result = work();
    ANSWERS.set(before);
    raw::set_errno(errno);
    result
}

/// Nanoseconds, of which the clocks' 63 bits are enough for 292 years.
fn nanos(time: Duration) -> i64 {
    i64::try_from(time.as_nanos()).unwrap_or(i64::MAX)
}

/// A time so many nanoseconds later, but not in front of the clock's zero.
fn moved(time: Duration, nanos_later: i64) -> Duration {
    let later = nanos(time).saturating_add(nanos_later);
    Duration::from_nanos(u64::try_from(later).unwrap_or(0))
}

fn ahead(clock: clockid_t) -> Option<&'static AtomicI64> {
    usize::try_from(clock)
        .ok()
        .and_then(|clock| AHEAD.get(clock))
}

/// The time that the program is told in place of the system's.
fn told(clock: clockid_t, system: Duration) -> Duration {
    let Some(ahead) = ahead(clock).filter(|_| counts()) else {
        return system;
    };
    own_work(|| {
        let Some(player) = record::player() else {
            if let Some(Some(kernel)) = own::own().kernel.get() {
                kernel.looked_at_clock(clock, system);
            }
            return system;
        };
        if let Some(time) = player.clock(clock) {
            let distance = nanos(time).saturating_sub(nanos(system));
            ahead.store(distance, Ordering::Relaxed);
            return time;
        }
        // More looks than the record has: the clock goes on from there.
        moved(system, ahead.load(Ordering::Relaxed))
    })
}

pub(crate) fn to_duration(time: timespec) -> Option<Duration> {
    let seconds = u64::try_from(time.tv_sec).ok()?;
    let nanos = u32::try_from(time.tv_nsec).ok()?;
    Some(Duration::new(seconds, nanos))
}

pub(crate) fn to_timespec(time: Duration) -> timespec {
    timespec {
        tv_sec: time.as_secs() as time_t,
        tv_nsec: time.subsec_nanos().into(),
    }
}

/// # Safety
/// As libc's function.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C-unwind" fn clock_gettime(clock: clockid_t, to: *mut timespec) -> c_int {
    let result = behind!(clock_gettime, (clock, to): fn(clockid_t, *mut timespec) -> c_int);
    if result == 0 && is_on() {
        // SAFETY: libc has just written the time there.
        let to = unsafe { &mut *to };
        if let Some(system) = to_duration(*to) {
            *to = to_timespec(told(clock, system));
        }
    }
    result
}

/// # Safety
/// As libc's function.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C-unwind" fn gettimeofday(to: *mut timeval, zone: *mut c_void) -> c_int {
    let result = behind!(gettimeofday, (to, zone): fn(*mut timeval, *mut c_void) -> c_int);
    if result == 0 && !to.is_null() && is_on() {
        // SAFETY: libc has just written the time there.
        let to = unsafe { &mut *to };
        let system = timespec {
            tv_sec: to.tv_sec,
            tv_nsec: to.tv_usec * 1000,
        };
        if let Some(system) = to_duration(system) {
            let time = told(libc::CLOCK_REALTIME, system);
            to.tv_sec = time.as_secs() as time_t;
            to.tv_usec = time.subsec_micros().into();
        }
    }
    result
}

/// # Safety
/// As libc's function.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C-unwind" fn time(to: *mut time_t) -> time_t {
    let system = behind!(time, (std::ptr::null_mut()): fn(*mut time_t) -> time_t);
    let seconds = u64::try_from(system).map_or(system, |seconds| {
        told(libc::CLOCK_REALTIME, Duration::from_secs(seconds)).as_secs() as time_t
    });
    if !to.is_null() {
        // SAFETY: the caller's promise.
        unsafe { *to = seconds };
    }
    seconds
}

/// The system's time at which a clock of the program reaches a time.
pub(crate) fn system_time(clock: clockid_t, time: timespec) -> timespec {
    let distance = ahead(clock).map_or(0, |ahead| ahead.load(Ordering::Relaxed));
    match to_duration(time) {
        Some(time) if distance != 0 => to_timespec(moved(time, -distance)),
        _ => time,
    }
}

/// What a clock of the system tells.
pub(crate) fn now(clock: clockid_t) -> Duration {
    let mut now = to_timespec(Duration::ZERO);
    // SAFETY: there is room for a time.
    own_work(|| unsafe { clock_gettime(clock, &raw mut now) });
    to_duration(now).unwrap_or_default()
}

/// The same for the clock that is nearer to the time: a condition does not tell its own.
pub(crate) fn system_time_of_nearest(time: timespec) -> timespec {
    system_time(nearest_clock(time), time)
}

fn nearest_clock(time: timespec) -> clockid_t {
    let distance = |clock: clockid_t| {
        let ahead = ahead(clock).map_or(0, |ahead| ahead.load(Ordering::Relaxed));
        let now = nanos(now(clock)).saturating_add(ahead);
        to_duration(time).map_or(0, |time| nanos(time).abs_diff(now))
    };
    match distance(libc::CLOCK_REALTIME) < distance(libc::CLOCK_MONOTONIC) {
        true => libc::CLOCK_REALTIME,
        false => libc::CLOCK_MONOTONIC,
    }
}

/// The time that is left until a clock of the program reaches a time.
pub(crate) fn left(clock: Option<clockid_t>, until: timespec) -> Duration {
    let clock = clock.unwrap_or_else(|| nearest_clock(until));
    let until = to_duration(system_time(clock, until)).unwrap_or_default();
    until.saturating_sub(now(clock))
}

/// The address of a deadline of the system's clock in place of the program's.
///
/// # Safety
/// The deadline is null, or can be read.
pub(crate) unsafe fn deadline(
    of_program: *const timespec,
    room: &mut timespec,
    translate: impl FnOnce(timespec) -> timespec,
) -> *const timespec {
    if of_program.is_null() || !is_on() {
        return of_program;
    }
    // SAFETY: the caller's promise.
    *room = translate(unsafe { *of_program });
    room
}

/// Waits up to a time of one of the program's clocks, which in a replay are not the system's. The thread may be cancelled in
/// them: nothing here is to be dropped.
macro_rules! waits {
    ($($name:ident ($($arg:ident: $ty:ty),*; $translate:expr);)*) => {
        $(
            /// # Safety
            /// As libc's function.
            #[unsafe(no_mangle)]
            pub(crate) unsafe extern "C-unwind" fn $name($($arg: $ty,)* until: *const timespec) -> c_int {
                let mut room = to_timespec(Duration::ZERO);
                // SAFETY: the caller's promise.
                let until = unsafe { deadline(until, &mut room, $translate) };
                behind!($name, ($($arg,)* until): fn($($ty,)* *const timespec) -> c_int)
            }
        )*
    };
}

waits! {
    sem_timedwait(semaphore: *mut sem_t; |time| system_time(libc::CLOCK_REALTIME, time));
    sem_clockwait(semaphore: *mut sem_t, clock: clockid_t; |time| system_time(clock, time));
}

/// # Safety
/// As libc's function.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C-unwind" fn clock_nanosleep(
    clock: clockid_t,
    flags: c_int,
    until: *const timespec,
    left: *mut timespec,
) -> c_int {
    let mut room = to_timespec(Duration::ZERO);
    let translate = |time| match flags & libc::TIMER_ABSTIME {
        0 => time,
        _ => system_time(clock, time),
    };
    // SAFETY: the caller's promise.
    let until = unsafe { deadline(until, &mut room, translate) };
    behind!(
        clock_nanosleep,
        (clock, flags, until, left): fn(clockid_t, c_int, *const timespec, *mut timespec) -> c_int
    )
}
