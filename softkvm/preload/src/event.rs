//! Eventfds of the program: those that guests' writes signal, and those that interrupt, for which a thread of ours
//! waits.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_ops_softkvm::{EventFd, Watch};
use kvm_ops_uapi::Errno;
use libc::{c_int, epoll_event, iovec};

use crate::own::own;
use crate::{raw, signals};

/// A duplicate of the program's descriptor, which the program does not see.
struct Event {
    fd: c_int,
    id: u64,
}

/// Numbers that the program does not reach soon. It takes the lowest free ones.
const HIGH: u64 = 1000;

/// The eventfd behind a number.
pub(crate) fn open(number: c_int) -> Result<Arc<dyn EventFd>, Errno> {
    let info = {
        let asking = &own().asking;
        let _alone = asking.lock().unwrap_or_else(PoisonError::into_inner);
        std::fs::read_to_string(format!("/proc/self/fdinfo/{number}")).map_err(|_| Errno::EBADF)?
    };
    let id = info
        .lines()
        .find_map(|line| line.strip_prefix("eventfd-id:"));
    let id = id
        .and_then(|id| id.trim().parse().ok())
        .ok_or(Errno::EINVAL)?;
    let duplicate = |from: u64| {
        let args = [number as u64, libc::F_DUPFD_CLOEXEC as u64, from, 0, 0, 0];
        // SAFETY: no memory is passed.
        unsafe { raw::syscall(libc::SYS_fcntl, args) as c_int }
    };
    let fd = match duplicate(HIGH) {
        -1 => duplicate(0),
        fd => fd,
    };
    if fd < 0 {
        return Err(Errno(raw::errno()));
    }
    Ok(Arc::new(Event { fd, id }))
}

impl EventFd for Event {
    fn id(&self) -> u64 {
        self.id
    }

    fn signal(&self) {
        // The kernel never waits here, so neither do we: a full counter stays as it is.
        if !raw::is_writable(self.fd) {
            return;
        }
        let one = 1u64;
        let args = [self.fd as u64, &raw const one as u64, 8, 0, 0, 0];
        // SAFETY: eight bytes are there.
        unsafe { raw::syscall(libc::SYS_write, args) };
    }

    fn watch(&self, wake: Box<dyn Fn() + Send + Sync>) -> Result<Box<dyn Watch>, Errno> {
        let watcher = Watcher::get().ok_or(Errno::ENOMEM)?;
        watcher.add(self, wake)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        raw::close(self.fd);
    }
}

/// Takes the counter. False if it is 0, because the program or another watcher took it.
fn take(fd: c_int) -> bool {
    /// RWF_NOWAIT: also a descriptor whose reads wait answers at once.
    const NOWAIT: u64 = 8;
    let mut count = 0u64;
    let vector = iovec {
        iov_base: (&raw mut count).cast(),
        iov_len: 8,
    };
    let args = [
        fd as u64,
        &raw const vector as u64,
        1,
        u64::MAX,
        u64::MAX,
        NOWAIT,
    ];
    // SAFETY: the vector names eight bytes, and both live through the call.
    unsafe { raw::syscall(libc::SYS_preadv2, args) == 8 }
}

/// An eventfd that is watched.
struct Watched {
    fd: c_int,
    wake: Box<dyn Fn() + Send + Sync>,
}

/// The thread that waits for eventfds.
pub(crate) struct Watcher {
    epoll: c_int,
    watched: Mutex<BTreeMap<u64, Arc<Watched>>>,
}

impl Watcher {
    /// The watcher, whose thread starts when it is needed first.
    fn get() -> Option<&'static Self> {
        let watcher = own().watcher.get_or_init(|| {
            let flags = libc::EPOLL_CLOEXEC as u64;
            // SAFETY: no memory is passed.
            let epoll = unsafe { raw::syscall(libc::SYS_epoll_create1, [flags, 0, 0, 0, 0, 0]) };
            (epoll >= 0).then(|| Self {
                epoll: epoll as c_int,
                watched: Mutex::default(),
            })
        });
        let watcher = watcher.as_ref()?;
        let runs = own().watches.get_or_init(|| {
            let thread = std::thread::Builder::new().name("kvm-ops-irqfd".to_owned());
            // The program's signals are for its own threads.
            signals::without(|| thread.spawn(|| watcher.run())).is_ok()
        });
        runs.then_some(watcher)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Arc<Watched>>> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn control(&self, operation: c_int, fd: c_int, id: u64) -> bool {
        let event = epoll_event {
            events: libc::EPOLLIN as u32,
            u64: id,
        };
        let at = &raw const event as u64;
        let args = [self.epoll as u64, operation as u64, fd as u64, at, 0, 0];
        // SAFETY: the event lives through the call.
        unsafe { raw::syscall(libc::SYS_epoll_ctl, args) == 0 }
    }

    fn add(
        &'static self,
        event: &Event,
        wake: Box<dyn Fn() + Send + Sync>,
    ) -> Result<Box<dyn Watch>, Errno> {
        let (fd, id) = (event.fd, event.id);
        let mut watched = self.lock();
        if watched.contains_key(&id) {
            return Err(Errno::EBUSY);
        }
        if !self.control(libc::EPOLL_CTL_ADD, fd, id) {
            return Err(Errno(raw::errno()));
        }
        watched.insert(id, Arc::new(Watched { fd, wake }));
        Ok(Box::new(Entry { watcher: self, id }))
    }

    fn run(&self) {
        let mut events = [epoll_event { events: 0, u64: 0 }; 16];
        loop {
            let at = events.as_mut_ptr() as u64;
            let args = [self.epoll as u64, at, events.len() as u64, u64::MAX, 0, 0];
            // SAFETY: so many events are there.
            let count = unsafe { raw::syscall(libc::SYS_epoll_wait, args) };
            let count = usize::try_from(count).unwrap_or(0);
            for event in &events[..count] {
                let id = event.u64;
                let watched = self.lock().get(&id).cloned();
                // Not under the lock: it may end a watch.
                if let Some(watched) = watched.filter(|watched| take(watched.fd)) {
                    (watched.wake)();
                }
            }
        }
    }
}

/// The place of an eventfd among those that are watched.
struct Entry {
    watcher: &'static Watcher,
    id: u64,
}

impl Watch for Entry {}

impl Drop for Entry {
    fn drop(&mut self) {
        let gone = self.watcher.lock().remove(&self.id);
        if let Some(gone) = gone {
            self.watcher.control(libc::EPOLL_CTL_DEL, gone.fd, self.id);
        }
    }
}
