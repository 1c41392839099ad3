//! Physical memory: sparse, shared by all processors, private lines encrypted and integrity-protected.
//!
//! As memory encryption does in hardware, protection works on 64-byte lines. A line carries the generation of the
//! key that it was written under, 0 without one. Host accesses go without key: they see ciphertext and turn a
//! written line into an ordinary one, which the TD's next read detects. A read with another private key than the
//! writer's fails. Hardware sees both by a bit of the line and a MAC of 28 bits; here bytes and generation change
//! in one step, so comparing the generation decides the same, without the chance that a MAC fits.
//!
//! Pages that a processor uses directly are open: they are kept in plaintext, and each view of them is made when it
//! is asked for.

mod crypt;
mod open;
mod page;
mod turn;
mod xts;

pub(crate) use crypt::{KeyRing, LineKey};
pub use open::GuestFrame;
pub(crate) use open::OpenPage;
use page::{Bytes, Page};
pub use turn::GuestTurn;

use crate::arena::lock;
use kvm_ops_turns::{Turn, Turns};
use std::ops::Deref;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

const PAGE: usize = 4096;
const LINE: usize = 64;
const LINES: usize = PAGE / LINE;
const CHUNK_PAGES: usize = 512;

/// A page with bytes.
enum Held {
    Stored(Page),
    Open(Arc<OpenPage>),
}

/// 2 MiB of memory. Pages never written, and pages zeroed whole, have no bytes: `zeroed_under` is the key
/// generation their zeros are encrypted with.
#[derive(Default)]
struct Chunk {
    pages: Option<Box<[Option<Held>]>>,
    zeroed_under: Option<Box<[u32; CHUNK_PAGES]>>,
}

/// The private read met a line that was not written with its key: the processor would take a machine check.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct IntegrityFailure;

/// Errors of a host access to physical memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum MemoryError {
    /// Beyond the end of RAM.
    OutOfRange {
        /// First address of the access, without key id.
        pa: u64,
    },
    /// The key-id bits name a private key id; outside SEAM mode such an access faults.
    PrivateKeyId {
        /// The key id.
        keyid: u64,
    },
}

impl core::fmt::Display for MemoryError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            MemoryError::OutOfRange { pa } => write!(f, "no memory at {pa:#x}"),
            MemoryError::PrivateKeyId { keyid } => {
                write!(
                    f,
                    "key id {keyid:#x} is private, the host cannot access memory with it"
                )
            }
        }
    }
}

impl std::error::Error for MemoryError {}

pub(crate) struct PhysicalMemory {
    bytes: u64,
    gigs: Box<[Gig]>,
    /// Bytes of pages that are gone, for pages that are made whole: the process has touched them already.
    spares: Mutex<Vec<Bytes>>,
    pub(crate) keys: KeyRing,
}

/// The most spare pages.
const SPARES: usize = 512;

/// A GiB in 512 chunks, absent while untouched.
type Gig = OnceLock<Box<[RwLock<Chunk>]>>;

/// View of private lines that an access has.
#[derive(Clone, Copy)]
enum View<'a> {
    /// Without key: ciphertext.
    Host,
    /// With a private key.
    Private(&'a LineKey),
    /// With the key of the line's writer; for observation.
    Plain,
}

impl PhysicalMemory {
    pub(crate) fn new(bytes: u64, keys: KeyRing) -> Self {
        PhysicalMemory {
            bytes,
            gigs: (0..bytes.div_ceil(1 << 30))
                .map(|_| OnceLock::new())
                .collect(),
            spares: Mutex::default(),
            keys,
        }
    }

    pub(crate) fn contains(&self, pa: u64, len: u64) -> bool {
        pa.checked_add(len).is_some_and(|end| end <= self.bytes)
    }

    /// Reads as the host does. Absent memory reads as zeros, as the module's own accesses need an answer.
    pub(crate) fn host_read(&self, pa: u64, buf: &mut [u8]) {
        let _ = self.read(pa, buf, View::Host);
    }

    pub(crate) fn host_read_u64(&self, pa: u64) -> u64 {
        let mut b = [0; 8];
        self.host_read(pa, &mut b);
        u64::from_le_bytes(b)
    }

    /// Writes as the host does. Writes to absent memory are dropped.
    pub(crate) fn host_write(&self, pa: u64, data: &[u8]) {
        let _ = self.write(pa, data, None);
    }

    /// Changes bytes of one page as the host does, in one access; returns the old bytes. A range that crosses a
    /// page is not changed.
    pub(crate) fn host_update<const N: usize>(
        &self,
        pa: u64,
        change: impl FnOnce([u8; N]) -> [u8; N],
    ) -> [u8; N] {
        let mut old = [0; N];
        if pa as usize % PAGE + N > PAGE {
            return old;
        }
        self.change(pa, |chunk, index| {
            // Accesses without key do not fail.
            let _ = read_page(chunk, index, pa, &mut old, View::Host, &self.keys);
            let new = change(old);
            let _ = write_page(chunk, index, pa, &new, None, &self.keys);
        });
        old
    }

    /// Reads with a TD's key (`None`: encryption is off).
    pub(crate) fn private_read(
        &self,
        pa: u64,
        buf: &mut [u8],
        key: Option<&LineKey>,
    ) -> Result<(), IntegrityFailure> {
        self.read(pa, buf, key.map_or(View::Host, View::Private))
    }

    /// Writes with a TD's key. A write of part of a line reads the rest first, and so can fail.
    pub(crate) fn private_write(
        &self,
        pa: u64,
        data: &[u8],
        key: Option<&LineKey>,
    ) -> Result<(), IntegrityFailure> {
        self.write(pa, data, key)
    }

    /// Reads within a page that is not open, for a processor that has a turn and so must wait for no other. Fails if
    /// the page is open all the same.
    pub(crate) fn private_try_read(
        &self,
        pa: u64,
        buf: &mut [u8],
        key: Option<&LineKey>,
    ) -> Result<(), IntegrityFailure> {
        let chunk = read_lock(self.chunk(pa, false).ok_or(IntegrityFailure)?);
        let index = page_index(pa);
        match chunk.held(index) {
            Some(Held::Open(_)) => Err(IntegrityFailure),
            _ => read_page(
                &chunk,
                index,
                pa,
                buf,
                key.map_or(View::Host, View::Private),
                &self.keys,
            ),
        }
    }

    /// Writes in the same way.
    pub(crate) fn private_try_write(
        &self,
        pa: u64,
        data: &[u8],
        key: Option<&LineKey>,
    ) -> Result<(), IntegrityFailure> {
        let mut chunk = write_lock(self.chunk(pa, true).ok_or(IntegrityFailure)?);
        let index = page_index(pa);
        match chunk.held(index) {
            Some(Held::Open(_)) => Err(IntegrityFailure),
            _ => write_page(&mut chunk, index, pa, data, key, &self.keys),
        }
    }

    /// Reads each line as its last writer sees it.
    pub(crate) fn peek(&self, pa: u64, buf: &mut [u8]) {
        let _ = self.read(pa, buf, View::Plain);
    }

    /// Makes the page at `to` from that at `from`, each seen with its key: `make` reads the one and writes all of
    /// the other, or has nothing, and then the page at `to` stays as it was.
    ///
    /// No byte is copied beside that, where no encryption of memory stands between: `make` reads the page where it
    /// lies, and what it writes becomes the other page. No page is locked for writing meanwhile, and `make` must not
    /// come back to memory.
    ///
    /// # Errors
    /// A line of the page at `from` was not written with its key.
    pub(crate) fn make_page<T>(
        &self,
        (from, from_key): (u64, Option<&LineKey>),
        (to, to_key): (u64, Option<&LineKey>),
        make: impl FnOnce(&[u8; PAGE], &mut [u8; PAGE]) -> Option<T>,
    ) -> Result<Option<T>, IntegrityFailure> {
        let spare = lock(&self.spares).pop();
        let mut page = spare.map_or_else(Page::zeros, Page::of);
        let made = page.overwrite(to, to_key, |out| {
            if from_key.is_none()
                && let Some(source) = self.chunk(from, false).map(read_lock)
                && let Some(bytes) = source.stored(page_index(from))
            {
                return Ok(make(bytes, out)).transpose();
            }
            let mut text = [0; PAGE];
            match self.private_read(from, &mut text, from_key) {
                Ok(()) => make(&text, out).map(Ok),
                Err(failure) => Some(Err(failure)),
            }
        });
        let old = match made {
            Some(Ok(_)) => self.replace(to, to_key, page)?,
            _ => Some(page),
        };
        self.keep_spare(old);
        made.transpose()
    }

    /// Puts a page in the place of another, and returns that one's if it was stored.
    fn replace(
        &self,
        pa: u64,
        key: Option<&LineKey>,
        page: Page,
    ) -> Result<Option<Page>, IntegrityFailure> {
        let Some(chunk) = self.chunk(pa, true) else {
            return Ok(None);
        };
        let mut chunk = write_lock(chunk);
        let held = &mut chunk.pages.get_or_insert_with(no_pages)[page_index(pa)];
        if matches!(held, Some(Held::Open(_))) {
            drop(chunk);
            // Processors have pointers to its bytes, so they are written.
            let mut plain = [0; PAGE];
            let view = key.map_or(View::Host, View::Private);
            page.read(pa, &mut plain, view, &self.keys)?;
            self.write(pa, &plain, key)?;
            return Ok(Some(page));
        }
        Ok(match held.replace(Held::Stored(page)) {
            Some(Held::Stored(old)) => Some(old),
            _ => None,
        })
    }

    fn keep_spare(&self, page: Option<Page>) {
        let Some(page) = page else { return };
        let mut spares = lock(&self.spares);
        if spares.len() < SPARES {
            spares.push(page.into_bytes());
        }
    }

    /// Makes whole pages zero under a key, without touching their bytes.
    pub(crate) fn zero_pages(&self, pa: u64, pages: u64, key: Option<&LineKey>) {
        let generation = key.map_or(0, LineKey::generation);
        for page in 0..pages {
            let old = self.change(pa + page * PAGE as u64, |chunk, index| {
                if generation != 0 || chunk.zeroed_under.is_some() {
                    chunk
                        .zeroed_under
                        .get_or_insert_with(|| Box::new([0; CHUNK_PAGES]))[index] = generation;
                }
                match chunk.pages.as_mut()?[index].take()? {
                    Held::Open(open) => {
                        open.turns().note_closed();
                        None
                    }
                    Held::Stored(page) => Some(page),
                }
            });
            self.keep_spare(old.flatten());
        }
    }

    /// Opens a page for the processors of the TD with that key (`None`: encryption is off). They ask in a turn
    /// or not, since no byte of an open page is touched.
    ///
    /// # Errors
    /// A line of the page was not written with the key.
    pub(crate) fn open(
        &self,
        pa: u64,
        key: Option<&Arc<LineKey>>,
    ) -> Result<Arc<OpenPage>, IntegrityFailure> {
        let pa = pa & !(PAGE as u64 - 1);
        let index = page_index(pa);
        let chunk = &mut *write_lock(self.chunk(pa, true).ok_or(IntegrityFailure)?);
        let zeros_under = chunk.zeroed_under.as_ref().map_or(0, |z| z[index]);
        let pages = chunk.pages.get_or_insert_with(no_pages);
        let turns = self.keys.turns(key);
        let open = match &pages[index] {
            Some(Held::Open(open)) if Arc::ptr_eq(open.turns(), turns) => return Ok(open.clone()),
            // Another TD's.
            Some(Held::Open(_)) => return Err(IntegrityFailure),
            Some(Held::Stored(page)) => OpenPage::of(page, pa, key, turns)?,
            None if zeros_under != key.map_or(0, |key| key.generation()) => {
                return Err(IntegrityFailure);
            }
            None => OpenPage::zeros(key, turns),
        };
        let open = Arc::new(open);
        pages[index] = Some(Held::Open(open.clone()));
        Ok(open)
    }

    /// The chunks of the GiB that `pa` is in. Without `create`, `None` for one never touched.
    fn chunks(&self, pa: u64, create: bool) -> Option<&[RwLock<Chunk>]> {
        let gig = usize::try_from(pa >> 30).ok()?;
        let gig = self.gigs.get(gig).filter(|_| pa < self.bytes)?;
        let fresh = || (0..CHUNK_PAGES).map(|_| RwLock::default()).collect();
        match create {
            true => Some(gig.get_or_init(fresh)),
            false => gig.get().map(|chunks| &**chunks),
        }
    }

    /// The chunk that `pa` is in.
    fn chunk(&self, pa: u64, create: bool) -> Option<&RwLock<Chunk>> {
        let chunks = self.chunks(pa, create)?;
        chunks.get((pa >> 21) as usize % CHUNK_PAGES)
    }

    /// Changes the chunk of `pa` at the page's index, in a turn of the page's TD if it is open. `None` for memory
    /// that does not exist.
    fn change<R>(&self, pa: u64, change: impl FnOnce(&mut Chunk, usize) -> R) -> Option<R> {
        let (chunk, index) = (self.chunk(pa, true)?, page_index(pa));
        // The chunk is let go before the turn.
        let (_turn, mut locked) = in_turn(index, || write_lock(chunk));
        Some(change(&mut locked, index))
    }

    fn read(&self, pa: u64, buf: &mut [u8], view: View<'_>) -> Result<(), IntegrityFailure> {
        for (pa, part) in parts_mut(pa, buf, PAGE) {
            let index = page_index(pa);
            // Memory that was never touched, or does not exist.
            let Some(chunk) = self.chunk(pa, false) else {
                read_zeros(0, pa, part, view, &self.keys)?;
                continue;
            };
            let (_turn, locked) = in_turn(index, || read_lock(chunk));
            read_page(&locked, index, pa, part, view, &self.keys)?;
        }
        Ok(())
    }

    fn write(&self, pa: u64, data: &[u8], key: Option<&LineKey>) -> Result<(), IntegrityFailure> {
        let mut offset = 0;
        while offset < data.len() {
            let at = pa.wrapping_add(offset as u64);
            let len = (PAGE - (at as usize & (PAGE - 1))).min(data.len() - offset);
            let part = &data[offset..offset + len];
            self.change(at, |chunk, index| {
                write_page(chunk, index, at, part, key, &self.keys)
            })
            .transpose()?;
            offset += len;
        }
        Ok(())
    }
}

fn read_lock(chunk: &RwLock<Chunk>) -> RwLockReadGuard<'_, Chunk> {
    chunk.read().unwrap_or_else(PoisonError::into_inner)
}

fn write_lock(chunk: &RwLock<Chunk>) -> RwLockWriteGuard<'_, Chunk> {
    chunk.write().unwrap_or_else(PoisonError::into_inner)
}

/// Locks a chunk, in a turn alone at the TD's pages if its page is open.
fn in_turn<G: Deref<Target = Chunk>>(index: usize, lock: impl Fn() -> G) -> (Option<Turn>, G) {
    let mut locked = lock();
    // Turns come before chunks: with the chunk locked no turn is waited for.
    let mut turn: Option<Turn> = None;
    while let Some(turns) = locked.turns(index) {
        if turn.as_ref().is_some_and(|turn| turn.is_alone_at(&turns)) {
            break;
        }
        turn = turns.try_take();
        if turn.is_none() {
            drop(locked);
            turn = Some(turns.take());
            locked = lock();
        }
    }
    (turn, locked)
}

/// Cuts a buffer at multiples of `unit` of its address.
fn parts_mut(pa: u64, mut buf: &mut [u8], unit: usize) -> impl Iterator<Item = (u64, &mut [u8])> {
    let mut at = pa;
    std::iter::from_fn(move || {
        if buf.is_empty() {
            return None;
        }
        let len = (unit - (at as usize & (unit - 1))).min(buf.len());
        let (head, tail) = std::mem::take(&mut buf).split_at_mut(len);
        buf = tail;
        let here = at;
        at = at.wrapping_add(len as u64);
        Some((here, head))
    })
}

fn page_index(pa: u64) -> usize {
    (pa >> 12) as usize % CHUNK_PAGES
}

fn no_pages() -> Box<[Option<Held>]> {
    (0..CHUNK_PAGES).map(|_| None).collect()
}

impl Chunk {
    fn held(&self, index: usize) -> Option<&Held> {
        self.pages.as_ref()?[index].as_ref()
    }

    /// The turns at a page, if it is open.
    fn turns(&self, index: usize) -> Option<Arc<Turns>> {
        match self.held(index)? {
            Held::Open(open) => Some(open.turns().clone()),
            Held::Stored(_) => None,
        }
    }

    /// The bytes of a page as the host sees them, where it has any and is not open.
    fn stored(&self, index: usize) -> Option<&[u8; PAGE]> {
        match self.held(index)? {
            Held::Stored(page) => Some(page.bytes()),
            Held::Open(_) => None,
        }
    }
}

fn read_page(
    chunk: &Chunk,
    index: usize,
    pa: u64,
    buf: &mut [u8],
    view: View<'_>,
    keys: &KeyRing,
) -> Result<(), IntegrityFailure> {
    match chunk.held(index) {
        Some(Held::Open(open)) => open.view(pa, buf, view, |generation| {
            keys.of_generation(generation).is_some()
        }),
        Some(Held::Stored(page)) => page.read(pa, buf, view, keys),
        None => {
            let generation = chunk.zeroed_under.as_ref().map_or(0, |z| z[index]);
            read_zeros(generation, pa, buf, view, keys)
        }
    }
}

/// Reads a page without bytes: zeros under a key.
fn read_zeros(
    generation: u32,
    pa: u64,
    buf: &mut [u8],
    view: View<'_>,
    keys: &KeyRing,
) -> Result<(), IntegrityFailure> {
    match view {
        View::Private(key) if key.generation() != generation => return Err(IntegrityFailure),
        View::Host if generation != 0 => {
            for (pa, part) in parts_mut(pa, buf, LINE) {
                let mut line = [0; LINE];
                let from = pa as usize % LINE;
                keys.encrypt_zeros(generation, pa - from as u64, &mut line);
                part.copy_from_slice(&line[from..from + part.len()]);
            }
        }
        _ => buf.fill(0),
    }
    Ok(())
}

fn write_page(
    chunk: &mut Chunk,
    index: usize,
    pa: u64,
    data: &[u8],
    key: Option<&LineKey>,
    keys: &KeyRing,
) -> Result<(), IntegrityFailure> {
    let zeros_under = chunk.zeroed_under.as_ref().map_or(0, |z| z[index]);
    let page_pa = pa & !(PAGE as u64 - 1);
    let held = &mut chunk.pages.get_or_insert_with(no_pages)[index];
    if let Some(Held::Open(open)) = held {
        if open.is_of(key) {
            open.write(pa as usize % PAGE, data);
            open.turns().note_written();
            return Ok(());
        }
        *held = Some(Held::Stored(open.close(page_pa)));
    }
    let fresh = || {
        Held::Stored(match zeros_under {
            // Overwritten whole, or ordinary zeros.
            generation if generation != 0 && data.len() < PAGE => {
                Page::zeros_under(page_pa, generation, keys)
            }
            _ => Page::zeros(),
        })
    };
    let Held::Stored(page) = held.get_or_insert_with(fresh) else {
        // It was closed above.
        return Err(IntegrityFailure);
    };
    page.write(pa, data, key)
}

#[cfg(all(test, not(loom)))]
mod tests;
