//! Open pages: private memory in plaintext, as the caches of a processor hold it.
//!
//! A page is opened whole, once all of its lines have passed their check, and stays open until the host or another
//! key writes to it. Then it is closed: encrypted, as if the caches were written back.

use super::crypt::LineKey;
use super::{IntegrityFailure, LINE, LINES, PAGE, Page, View, parts_mut};
use kvm_ops_turns::Turns;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

const WORD: usize = 8;
const WORDS: usize = PAGE / WORD;

/// A page that is open. Its bytes are used in turns only: by one thread alone, or by several that use atomic accesses.
pub(crate) struct OpenPage {
    /// Absent without encryption.
    key: Option<Arc<LineKey>>,
    turns: Arc<Turns>,
    words: Box<Words>,
}

/// Aligned for the widest atomic access of a processor, which is one of 16 bytes.
#[repr(align(16))]
struct Words([AtomicU64; WORDS]);

/// A page of a TD's private memory that a processor may use directly.
///
/// The bytes stay where they are as long as this value lives. They are the TD's until [`GuestTurn::closed`] tells
/// another number; from then on nothing reads what is written to them.
///
/// [`GuestTurn::closed`]: crate::GuestTurn::closed
#[derive(Clone)]
pub struct GuestFrame {
    page: Arc<OpenPage>,
    is_writable: bool,
}

impl GuestFrame {
    pub(crate) fn new(page: Arc<OpenPage>, is_writable: bool) -> Self {
        GuestFrame { page, is_writable }
    }

    /// The first of the page's 4096 bytes, aligned to 16. They may be read, and written if [`GuestFrame::is_writable`],
    /// by a thread that has a [`GuestTurn`](crate::GuestTurn) of the TD: by atomic accesses in one that others share.
    #[must_use]
    pub fn bytes(&self) -> NonNull<u8> {
        NonNull::from(&self.page.words.0).cast()
    }

    /// The TD may write the page.
    #[must_use]
    pub fn is_writable(&self) -> bool {
        self.is_writable
    }
}

impl core::fmt::Debug for GuestFrame {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("GuestFrame")
            .field("is_writable", &self.is_writable)
            .finish_non_exhaustive()
    }
}

fn generation(key: Option<&Arc<LineKey>>) -> u32 {
    key.map_or(0, |key| key.generation())
}

impl OpenPage {
    /// A page of zeros.
    pub(super) fn zeros(key: Option<&Arc<LineKey>>, turns: &Arc<Turns>) -> Self {
        OpenPage {
            key: key.cloned(),
            turns: turns.clone(),
            words: Box::new(Words([const { AtomicU64::new(0) }; WORDS])),
        }
    }

    /// Decrypts a page.
    pub(super) fn of(
        page: &Page,
        pa: u64,
        key: Option<&Arc<LineKey>>,
        turns: &Arc<Turns>,
    ) -> Result<Self, IntegrityFailure> {
        let open = Self::zeros(key, turns);
        let Some(key) = key else {
            open.write(0, page.bytes());
            return Ok(open);
        };
        page.check(0..LINES, key)?;
        let mut bytes = [0; PAGE];
        key.decrypt_to(pa, page.bytes(), &mut bytes);
        open.write(0, &bytes);
        Ok(open)
    }

    pub(super) fn turns(&self) -> &Arc<Turns> {
        &self.turns
    }

    /// Returns true if accesses with this key see the plaintext.
    pub(super) fn is_of(&self, key: Option<&LineKey>) -> bool {
        generation(self.key.as_ref()) == key.map_or(0, LineKey::generation)
    }

    pub(super) fn read(&self, from: usize, buf: &mut [u8]) {
        for (at, byte) in (from..).zip(buf) {
            *byte = self.words.0[at / WORD].load(Relaxed).to_ne_bytes()[at % WORD];
        }
    }

    pub(super) fn write(&self, from: usize, data: &[u8]) {
        for (at, byte) in (from..).zip(data) {
            let word = &self.words.0[at / WORD];
            let mut bytes = word.load(Relaxed).to_ne_bytes();
            bytes[at % WORD] = *byte;
            word.store(u64::from_ne_bytes(bytes), Relaxed);
        }
    }

    /// Reads as a view shows the page. `is_alive` says that the key is still programmed, or in escrow.
    pub(super) fn view(
        &self,
        pa: u64,
        buf: &mut [u8],
        view: View<'_>,
        is_alive: impl Fn(u32) -> bool,
    ) -> Result<(), IntegrityFailure> {
        let offset = pa as usize % PAGE;
        let plain = match view {
            View::Private(key) if !self.is_of(Some(key)) => return Err(IntegrityFailure),
            View::Private(_) => true,
            View::Plain => self
                .key
                .as_ref()
                .is_none_or(|key| is_alive(key.generation())),
            View::Host => self.key.is_none(),
        };
        match &self.key {
            Some(key) if !plain => {
                for (pa, part) in parts_mut(pa, buf, LINE) {
                    let from = pa as usize % LINE;
                    let line = self.ciphertext(key, pa - from as u64);
                    part.copy_from_slice(&line[from..from + part.len()]);
                }
            }
            _ => self.read(offset, buf),
        }
        Ok(())
    }

    fn ciphertext(&self, key: &LineKey, line_pa: u64) -> [u8; LINE] {
        let mut line = [0; LINE];
        self.read(line_pa as usize % PAGE, &mut line);
        key.encrypt(line_pa, &mut line);
        line
    }

    /// The page as memory holds it. Whoever has a pointer to the open one asks again.
    pub(super) fn close(&self, pa: u64) -> Page {
        self.turns.note_closed();
        let mut page = Page::zeros();
        page.overwrite(pa, self.key.as_deref(), |bytes| {
            self.read(0, bytes);
            Some(())
        });
        page
    }
}
