//! Locks of a program whose run is recorded, or served from a record. Its threads take them in a replay in the order of the
//! record, and waits of a thread for something else are over when it is its turn to take one.
//!
//! A lock is known again by its place in the program or in a library, so those on the heap have no order.

use std::ffi::CStr;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use kvm_ops_softkvm::{Kernel, Player};
use libc::{
    c_int, c_void, clockid_t, nfds_t, pollfd, pthread_cond_t, pthread_mutex_t, sigset_t, timespec,
};

use crate::behind::behind;
use crate::clock::{self, own_work};
use crate::{own, record};

/// Memory with the variables of the program, or of a library.
struct Object {
    name: String,
    base: usize,
    start: usize,
    end: usize,
}

/// What was loaded when the record began.
static OBJECTS: OnceLock<Vec<Object>> = OnceLock::new();

/// Finds where variables are.
pub(crate) fn find() {
    extern "C" fn note(info: *mut libc::dl_phdr_info, _: usize, list: *mut c_void) -> c_int {
        // SAFETY: the loader passes a description that is valid during the call, and the list of the caller.
        let (info, list) = unsafe { (&*info, &mut *list.cast::<Vec<Object>>()) };
        // SAFETY: the name is a string.
        let path = unsafe { CStr::from_ptr(info.dlpi_name) }.to_string_lossy();
        let name = path.rsplit('/').next().unwrap_or_default();
        let name = match name {
            "" => "program".to_owned(),
            name => name.split_whitespace().collect(),
        };
        for n in 0..usize::from(info.dlpi_phnum) {
            // SAFETY: the description has so many headers.
            let header = unsafe { &*info.dlpi_phdr.add(n) };
            if header.p_type == libc::PT_LOAD && header.p_flags & libc::PF_W != 0 {
                let base = info.dlpi_addr as usize;
                let start = base + header.p_vaddr as usize;
                list.push(Object {
                    name: name.clone(),
                    base,
                    start,
                    end: start + header.p_memsz as usize,
                });
            }
        }
        0
    }
    OBJECTS.get_or_init(|| {
        let mut list: Vec<Object> = Vec::new();
        // SAFETY: the list lives through the call.
        unsafe { libc::dl_iterate_phdr(Some(note), (&raw mut list).cast()) };
        list.sort_by_key(|object| object.start);
        list
    });
}

/// The record's name of a lock. `None` on the heap or the stack.
fn name(lock: *mut pthread_mutex_t) -> Option<String> {
    let objects = OBJECTS.get()?;
    let at = lock.addr();
    let behind = objects.partition_point(|object| object.start <= at);
    let object = objects.get(behind.checked_sub(1)?)?;
    (at < object.end).then(|| format!("{}+{:x}", object.name, at - object.base))
}

/// Who is told of a lock.
enum Side {
    Recorder(&'static Kernel),
    Player(&'static Player),
}

/// The record's side of what the calling thread does. `None` without one.
fn side() -> Option<Side> {
    if !clock::counts() {
        return None;
    }
    own_work(|| match record::player() {
        Some(player) => Some(Side::Player(player)),
        None => own::own().kernel.get()?.as_ref().map(Side::Recorder),
    })
}

/// A lock whose order matters.
struct Ordered {
    name: String,
    side: Side,
}

impl Ordered {
    fn of(lock: *mut pthread_mutex_t) -> Option<Self> {
        let side = side()?;
        own_work(|| name(lock)).map(|name| Self { name, side })
    }

    /// Waits for the turn of the calling thread. False if it need not be told.
    fn wait(&self) -> bool {
        match self.side {
            Side::Recorder(_) => true,
            Side::Player(player) => own_work(|| player.wait_for_lock(&self.name)),
        }
    }

    fn took(&self) {
        own_work(|| match self.side {
            Side::Recorder(kernel) => kernel.took_lock(&self.name),
            Side::Player(player) => player.took_lock(&self.name),
        });
    }

    fn released(&self) {
        if let Side::Player(player) = self.side {
            own_work(|| player.released_lock(&self.name));
        }
    }
}

/// Takes a lock by a function of libc in its turn.
fn take(lock: *mut pthread_mutex_t, function: impl FnOnce() -> c_int) -> c_int {
    let Some(ordered) = Ordered::of(lock) else {
        return function();
    };
    let counts = ordered.wait();
    let result = function();
    if result == 0 && counts {
        ordered.took();
    }
    result
}

fn lock_now(lock: *mut pthread_mutex_t) -> c_int {
    behind!(pthread_mutex_lock, (lock): fn(*mut pthread_mutex_t) -> c_int)
}

fn unlock_now(lock: *mut pthread_mutex_t) -> c_int {
    behind!(pthread_mutex_unlock, (lock): fn(*mut pthread_mutex_t) -> c_int)
}

/// # Safety
/// As libc's function.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C-unwind" fn pthread_mutex_lock(lock: *mut pthread_mutex_t) -> c_int {
    take(lock, || lock_now(lock))
}

/// # Safety
/// As libc's function.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C-unwind" fn pthread_mutex_trylock(lock: *mut pthread_mutex_t) -> c_int {
    take(
        lock,
        || behind!(pthread_mutex_trylock, (lock): fn(*mut pthread_mutex_t) -> c_int),
    )
}

/// # Safety
/// As libc's function.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C-unwind" fn pthread_mutex_timedlock(
    lock: *mut pthread_mutex_t,
    until: *const timespec,
) -> c_int {
    let mut room = clock::to_timespec(Duration::ZERO);
    let translate = |time| clock::system_time(libc::CLOCK_REALTIME, time);
    // SAFETY: the caller's promise.
    let until = unsafe { clock::deadline(until, &mut room, translate) };
    take(lock, || {
        behind!(
            pthread_mutex_timedlock,
            (lock, until): fn(*mut pthread_mutex_t, *const timespec) -> c_int
        )
    })
}

/// # Safety
/// As libc's function.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C-unwind" fn pthread_mutex_unlock(lock: *mut pthread_mutex_t) -> c_int {
    let ordered = Ordered::of(lock);
    let result = unlock_now(lock);
    if let Some(ordered) = ordered {
        ordered.released();
    }
    result
}

/// The time after which a wait of a replay asks whether it is the thread's turn.
const SLICE: Duration = Duration::from_millis(1);

/// Waits for a condition. In a replay it waits in slices, so that it is over when it is the thread's turn to have the lock: any
/// wait for a condition may be over without one.
fn wait(
    condition: *mut pthread_cond_t,
    lock: *mut pthread_mutex_t,
    left: impl FnOnce() -> Option<Duration>,
    function: impl FnOnce() -> c_int,
) -> c_int {
    let Some(ordered) = Ordered::of(lock) else {
        return function();
    };
    let Side::Player(player) = ordered.side else {
        let result = function();
        ordered.took();
        return result;
    };
    let late = own_work(|| left().map(|left| Instant::now() + left));
    ordered.released();
    let result = loop {
        let until = own_work(|| clock::now(libc::CLOCK_MONOTONIC) + SLICE);
        let until = clock::to_timespec(until);
        let result = behind!(
            pthread_cond_clockwait,
            (condition, lock, libc::CLOCK_MONOTONIC, &raw const until):
                fn(*mut pthread_cond_t, *mut pthread_mutex_t, clockid_t, *const timespec) -> c_int
        );
        if result != libc::ETIMEDOUT || own_work(|| late.is_some_and(|late| Instant::now() >= late))
        {
            break result;
        }
        if own_work(|| player.is_awaited()) {
            break 0;
        }
    };
    // The lock is this thread's again, perhaps in front of its turn.
    unlock_now(lock);
    take(lock, || lock_now(lock));
    result
}

/// # Safety
/// As libc's function.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C-unwind" fn pthread_cond_wait(
    condition: *mut pthread_cond_t,
    lock: *mut pthread_mutex_t,
) -> c_int {
    wait(
        condition,
        lock,
        || None,
        || {
            behind!(
                pthread_cond_wait @ c"GLIBC_2.3.2",
                (condition, lock): fn(*mut pthread_cond_t, *mut pthread_mutex_t) -> c_int
            )
        },
    )
}

/// # Safety
/// As libc's function.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C-unwind" fn pthread_cond_timedwait(
    condition: *mut pthread_cond_t,
    lock: *mut pthread_mutex_t,
    until: *const timespec,
) -> c_int {
    // SAFETY: the caller's promise.
    let left = || unsafe { until.as_ref() }.map(|until| clock::left(None, *until));
    wait(condition, lock, left, || {
        let mut room = clock::to_timespec(Duration::ZERO);
        // SAFETY: the caller's promise.
        let until = unsafe { clock::deadline(until, &mut room, clock::system_time_of_nearest) };
        behind!(
            pthread_cond_timedwait @ c"GLIBC_2.3.2",
            (condition, lock, until):
                fn(*mut pthread_cond_t, *mut pthread_mutex_t, *const timespec) -> c_int
        )
    })
}

/// # Safety
/// As libc's function.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C-unwind" fn pthread_cond_clockwait(
    condition: *mut pthread_cond_t,
    lock: *mut pthread_mutex_t,
    clock: clockid_t,
    until: *const timespec,
) -> c_int {
    // SAFETY: the caller's promise.
    let left = || unsafe { until.as_ref() }.map(|until| clock::left(Some(clock), *until));
    wait(condition, lock, left, || {
        let mut room = clock::to_timespec(Duration::ZERO);
        let translate = |time| clock::system_time(clock, time);
        // SAFETY: the caller's promise.
        let until = unsafe { clock::deadline(until, &mut room, translate) };
        behind!(
            pthread_cond_clockwait,
            (condition, lock, clock, until):
                fn(*mut pthread_cond_t, *mut pthread_mutex_t, clockid_t, *const timespec) -> c_int
        )
    })
}

/// Waits for descriptors in a replay: until it is the thread's turn to take a lock, at the latest.
fn poll_in_turn(
    player: &Player,
    timeout: Option<Duration>,
    poll: impl Fn(Duration) -> c_int,
) -> c_int {
    let late = own_work(|| timeout.map(|timeout| Instant::now() + timeout));
    loop {
        let left = own_work(|| late.map(|late| late.saturating_duration_since(Instant::now())));
        let is_over = left.is_some_and(|left| left.is_zero()) || own_work(|| player.is_awaited());
        let slice = match is_over {
            true => Duration::ZERO,
            false => left.map_or(SLICE, |left| left.min(SLICE)),
        };
        let ready = poll(slice);
        if ready != 0 || is_over {
            return ready;
        }
    }
}

/// # Safety
/// As libc's function.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C-unwind" fn ppoll(
    fds: *mut pollfd,
    count: nfds_t,
    timeout: *const timespec,
    mask: *const sigset_t,
) -> c_int {
    let poll = |timeout: *const timespec| {
        behind!(
            ppoll,
            (fds, count, timeout, mask):
                fn(*mut pollfd, nfds_t, *const timespec, *const sigset_t) -> c_int
        )
    };
    let Some(Side::Player(player)) = side() else {
        return poll(timeout);
    };
    // SAFETY: the caller's promise.
    let time = unsafe { timeout.as_ref() }.map(|time| clock::to_duration(*time));
    match time {
        // A time that is none, which the system refuses.
        Some(None) => poll(timeout),
        time => poll_in_turn(player, time.flatten(), |slice| {
            let slice = clock::to_timespec(slice);
            poll(&raw const slice)
        }),
    }
}

/// # Safety
/// As libc's function.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C-unwind" fn poll(
    fds: *mut pollfd,
    count: nfds_t,
    timeout: c_int,
) -> c_int {
    let poll = |millis: c_int| behind!(poll, (fds, count, millis): fn(*mut pollfd, nfds_t, c_int) -> c_int);
    let Some(Side::Player(player)) = side() else {
        return poll(timeout);
    };
    // Less than none is no end.
    let timeout = u64::try_from(timeout).ok().map(Duration::from_millis);
    poll_in_turn(player, timeout, |slice| poll(slice.as_millis() as c_int))
}
