//! The measured start: TDH.MEM.PAGE.ADD, TDH.MR.EXTEND and TDH.MR.FINALIZE.

use kvm_ops::{
    Error, Field, Gfn, Gpa, Host, InitialPage, InitialPageKind, Level, Measurement, PAGE_SIZE,
    PagePort, Privacy, PrivateSpte, Result, Step,
};
use kvm_ops_mmu::Mapped;

use super::{POISONED, Td};

/// Bytes that one TDH.MR.EXTEND measures.
const CHUNK: u64 = 256;

/// The first of the six TDCS fields that hold MRTD (TDX module ABI, "TD-scope metadata").
const MRTD: u64 = 0x1310_0003_0000_0000;

impl<H: Host> Td<H> {
    /// Adds a page to the TD's start. Its address is measured in any case.
    pub(crate) fn add_initial_page(&self, page: &InitialPage<'_>) -> Result<()> {
        self.life.require(Step::Initialized)?;
        self.require_launch()?;
        let gfn = self.private_page_at(page.gpa)?;
        let measured = match page.kind {
            InitialPageKind::Measured => true,
            InitialPageKind::Unmeasured => false,
            _ => return kvm_ops::not_offered!("an initial page of this kind"),
        };
        let private = self.write_private();
        if !private.may_be_private(gfn) {
            return Err(Error::NotFound(Field::Gpa, page.gpa.get()));
        }
        let source = self.scratch()?;
        self.pages()?.write(source, page.contents)?;
        self.lock(&self.control).source = Some(source);
        let target = || self.take_page(Level::Size4K);
        let mapped = private.mirror.map(self, gfn, Level::Size4K, target);
        self.lock(&self.control).source = None;
        drop(private);
        if mapped? != Mapped::New {
            return Err(Error::Exists(Field::Gpa, page.gpa.get()));
        }
        if measured {
            self.measure(page.gpa)?;
        }
        Ok(())
    }

    /// Adds the contents of a page that is there to the measurement.
    pub(crate) fn measure_initial_page(&self, gpa: Gpa) -> Result<()> {
        self.life.require(Step::Initialized)?;
        self.require_launch()?;
        let gfn = self.private_page_at(gpa)?;
        let found = self.read_private().mirror.lookup(gfn);
        match found.entry {
            PrivateSpte::Mapped(_) => self.measure(gpa),
            _ => Err(Error::NotFound(Field::Gpa, gpa.get())),
        }
    }

    /// The frame of a page-aligned private address that the TD can have.
    fn private_page_at(&self, gpa: Gpa) -> Result<Gfn> {
        match self.mask.split(gpa) {
            (gfn, Privacy::Private) if gpa.is_page_aligned() && gfn.get() < self.frames() => {
                Ok(gfn)
            }
            _ => Err(Error::Invalid(Field::Gpa, gpa.get())),
        }
    }

    /// Adds the contents of a page to the measurement. A measurement that stops half-way cannot be
    /// taken back, so every failure poisons the TD.
    fn measure(&self, gpa: Gpa) -> Result<()> {
        let (calls, tdr) = (self.calls()?, self.tdr()?);
        for offset in (0..PAGE_SIZE).step_by(CHUNK as usize) {
            calls.mr_extend(gpa.get() + offset, tdr).map_err(|failed| {
                self.poison_by(failed.report(&self.life, Some(POISONED)));
                failed.leak_error()
            })?;
        }
        Ok(())
    }

    /// `Initialized -> Runnable`. The module finalises no TD without a vCPU.
    pub(crate) fn finalize(&self) -> Result<()> {
        self.life.require(Step::Initialized)?;
        self.require_launch()?;
        if self.ready_vcpus().is_empty() {
            return Err(Error::Invalid(Field::VcpuCount, 0));
        }
        self.calls()?
            .mr_finalize(self.tdr()?)
            .map_err(|failed| self.failed(&failed))?;
        self.drop_scratch();
        self.took_step("measurement closed", None);
        self.life.advance(Step::Runnable)
    }

    /// Reads MRTD, which is final once the TD is.
    pub(crate) fn measurement(&self) -> Result<Measurement> {
        self.life.require(Step::Runnable)?;
        let (calls, tdr) = (self.calls()?, self.tdr()?);
        let mut mrtd = [0; 48];
        for (field, bytes) in (MRTD..).zip(mrtd.chunks_exact_mut(8)) {
            let value = calls
                .mng_rd(tdr, field)
                .map_err(|failed| self.failed(&failed))?;
            bytes.copy_from_slice(&value.to_le_bytes());
        }
        Ok(Measurement::new(mrtd))
    }
}
