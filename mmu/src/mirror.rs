//! The mirror. This revision holds its public face; the bodies answer "not offered".

use crate::{Gfn, Level, MirrorHooks, Pfn, PrivateSpte, Result};

/// How [`Mirror::map`] ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mapped {
    /// The page is mapped now.
    New,
    /// It was mapped already, as asked; no hook was called.
    Spurious,
    /// Another thread is at this entry, or at a table above it. Try again.
    Retry,
    /// Something else is there: another page, a blocked one, or a table where a 2 MiB page was
    /// wanted. The caller's page is not used. What is blocked needs [`Mirror::unblock`], or a `zap` that is run again.
    Occupied(Lookup),
}

/// The entry that decides about a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lookup {
    /// The level where the walk ended.
    pub level: Level,
    /// What is there. An entry that is being changed shows its old value.
    pub entry: PrivateSpte,
}

/// What [`Mirror::zap`] does about tables that it leaves empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EmptyTables {
    /// They stay: the next fault needs no SEPT.ADD (Linux, while a TD lives).
    Keep,
    /// They are unlinked and freed, which costs one more flush for each level that has any.
    Free,
}

/// What [`Mirror::zap`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Zapped {
    /// Guest pages removed, of any size.
    pub pages: u64,
    /// Tables removed.
    pub tables: u64,
}

/// What a page is that [`Mirror::drain`] lists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Held {
    /// A page of the guest.
    Page,
    /// A page of the Secure-EPT.
    Table,
}

/// What the mirror holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// 4 KiB pages, blocked ones among them.
    pub pages_4k: u64,
    /// 2 MiB pages, blocked ones among them.
    pub pages_2m: u64,
    /// How many of the pages are blocked.
    pub blocked: u64,
    /// Pages of the Secure-EPT, without the root.
    pub tables: u64,
    /// Bytes of host memory that the mirror's nodes take.
    pub bytes: u64,
}

/// The mirror of a Secure-EPT.
#[derive(Debug)]
pub struct Mirror(());

#[allow(missing_docs, unused_variables)]
impl Mirror {
    pub fn new(root: Level) -> Result<Self> {
        kvm_ops_core::unsupported!("mirror")
    }
    pub fn map(
        &self,
        hooks: &impl MirrorHooks,
        gfn: Gfn,
        level: Level,
        page: Pfn,
    ) -> Result<Mapped> {
        kvm_ops_core::unsupported!("mirror")
    }
    pub fn lookup(&self, gfn: Gfn) -> Lookup {
        Lookup {
            level: Level::Size512G,
            entry: PrivateSpte::Absent,
        }
    }
    pub fn map_range(
        &mut self,
        hooks: &impl MirrorHooks,
        first: Gfn,
        pages: u64,
        page_of: impl FnMut(Gfn) -> Result<Pfn>,
    ) -> Result<u64> {
        kvm_ops_core::unsupported!("mirror")
    }
    pub fn zap(
        &mut self,
        hooks: &impl MirrorHooks,
        first: Gfn,
        pages: u64,
        empty: EmptyTables,
    ) -> Result<Zapped> {
        kvm_ops_core::unsupported!("mirror")
    }
    pub fn block(&mut self, hooks: &impl MirrorHooks, first: Gfn, pages: u64) -> Result<u64> {
        kvm_ops_core::unsupported!("mirror")
    }
    pub fn unblock(&mut self, hooks: &impl MirrorHooks, first: Gfn, pages: u64) -> Result<u64> {
        kvm_ops_core::unsupported!("mirror")
    }
    pub fn demote(&mut self, hooks: &impl MirrorHooks, gfn: Gfn) -> Result<()> {
        kvm_ops_core::unsupported!("mirror")
    }
    pub fn promote(&mut self, hooks: &impl MirrorHooks, gfn: Gfn) -> Result<()> {
        kvm_ops_core::unsupported!("mirror")
    }
    pub fn drain(&mut self, f: impl FnMut(Pfn, Level, Held)) {}
    pub fn for_each(&self, f: impl FnMut(Gfn, Level, PrivateSpte)) {}
    pub fn stats(&self) -> Stats {
        Stats::default()
    }
}
