//! The initial memory of a TD, page by page.

use alloc::borrow::Cow;
use alloc::boxed::Box;
use alloc::vec::Vec;

use thiserror::Error;

use crate::{Mrtd, PAGE_SIZE, Section, Tdvf};

/// In which order pages are added and measured. The calls are the same; MRTD is another.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Order {
    /// A page is added and at once measured, then the next (`KVM_TDX_INIT_MEM_REGION` of Linux).
    #[default]
    SinglePass,
    /// All pages of a section are added, then all are measured.
    TwoPass,
}

/// One page of a launch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageAdd<'a> {
    /// Its guest-physical address.
    pub gpa: u64,
    /// The contents that TDH.MEM.PAGE.ADD copies into it.
    pub contents: &'a [u8; PAGE_SIZE],
    /// Set if 16 TDH.MR.EXTENDs follow.
    pub measured: bool,
    /// The number of its section.
    pub section: usize,
}

/// One step of a launch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step<'a> {
    /// TDH.MEM.PAGE.ADD.
    Add(PageAdd<'a>),
    /// 16 times TDH.MR.EXTEND, of a page that was added.
    Measure(PageAdd<'a>),
}

/// Errors of filling a section.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum FillError {
    /// The image has no such section.
    #[error("there is no section {0}")]
    NoSection(usize),
    /// Its contents are in the image, or are zeros, or are not there at the launch.
    #[error("section {0} is not the VMM's to fill")]
    NotFillable(usize),
    /// More data than memory.
    #[error("{length:#x} bytes do not fit into section {section} of {memory:#x} bytes")]
    TooLong {
        /// Its number.
        section: usize,
        /// Bytes of data.
        length: usize,
        /// Bytes of memory.
        memory: u64,
    },
}

/// The pages of a launch. A VMM takes them from here, and so does the MRTD off line:
/// what is measured is what is launched.
#[derive(Clone, Debug)]
pub struct Launch<'a> {
    sections: &'a [Section],
    data: Vec<Data<'a>>,
}

/// The contents of a section, before the zeros.
#[derive(Clone, Debug)]
struct Data<'a> {
    bytes: Cow<'a, [u8]>,
    /// The last page, with zeros behind the bytes, if they are no whole number of pages.
    last: Option<Box<[u8; PAGE_SIZE]>>,
}

impl<'a> Data<'a> {
    fn new(bytes: Cow<'a, [u8]>) -> Self {
        let rest = bytes.as_chunks::<PAGE_SIZE>().1;
        let last = (!rest.is_empty()).then(|| {
            let mut page = Box::new([0; PAGE_SIZE]);
            page[..rest.len()].copy_from_slice(rest);
            page
        });
        Self { bytes, last }
    }

    fn page(&self, number: u64) -> &[u8; PAGE_SIZE] {
        let whole = self.bytes.as_chunks().0;
        let page = usize::try_from(number).ok().and_then(|n| whole.get(n));
        match (page, &self.last) {
            (Some(page), _) => page,
            (None, Some(last)) if number == whole.len() as u64 => last,
            (None, _) => &ZEROS,
        }
    }
}

static ZEROS: [u8; PAGE_SIZE] = [0; PAGE_SIZE];

impl<'a> Launch<'a> {
    pub(crate) fn new(tdvf: &'a Tdvf<'_>) -> Self {
        let sections = tdvf.sections();
        let data = |section: &Section| section.data(tdvf.image()).unwrap_or_default();
        Self {
            sections,
            data: sections
                .iter()
                .map(|s| Data::new(Cow::Borrowed(data(s))))
                .collect(),
        }
    }

    /// Puts what the VMM provides into a section without raw data: a hand-off block, a kernel, its
    /// parameters.
    ///
    /// # Errors
    /// [`FillError`] if the section is not the VMM's to fill, or too small.
    pub fn fill(
        &mut self,
        section: usize,
        data: impl Into<Cow<'a, [u8]>>,
    ) -> Result<(), FillError> {
        let data = data.into();
        let (Some(place), Some(known)) = (self.data.get_mut(section), self.sections.get(section))
        else {
            return Err(FillError::NoSection(section));
        };
        if known.raw_size != 0 || !known.kind.is_filled_by_vmm() {
            return Err(FillError::NotFillable(section));
        }
        if data.len() as u64 > known.memory_size {
            return Err(FillError::TooLong {
                section,
                length: data.len(),
                memory: known.memory_size,
            });
        }
        *place = Data::new(data);
        Ok(())
    }

    /// The number of pages added before the launch.
    pub fn page_count(&self) -> u64 {
        self.sections
            .iter()
            .filter(|section| !section.attributes.aug)
            .map(Section::pages)
            .sum()
    }

    /// The pages in the order of the launch.
    pub fn pages(&self) -> impl Iterator<Item = PageAdd<'_>> {
        (0..self.sections.len()).flat_map(|index| self.section_pages(index))
    }

    /// The pages of one section; none of one with PAGE.AUG, or that is not there.
    fn section_pages(&self, index: usize) -> impl Iterator<Item = PageAdd<'_>> {
        let section = self.sections.get(index).filter(|s| !s.attributes.aug);
        let section = section.zip(self.data.get(index));
        section.into_iter().flat_map(move |(section, data)| {
            (0..section.pages()).map(move |page| PageAdd {
                gpa: section.memory_address + page * PAGE_SIZE as u64,
                contents: data.page(page),
                measured: section.attributes.extend,
                section: index,
            })
        })
    }

    /// The steps of the launch, in that order.
    pub fn steps(&self, order: Order) -> impl Iterator<Item = Step<'_>> {
        (0..self.sections.len()).flat_map(move |section| {
            let at_once = order == Order::SinglePass;
            let first = self.section_pages(section).flat_map(move |page| {
                let measure = (at_once && page.measured).then(|| Step::Measure(page.clone()));
                core::iter::once(Step::Add(page)).chain(measure)
            });
            let pages = self.section_pages(section);
            let second = pages.filter(move |page| !at_once && page.measured);
            first.chain(second.map(Step::Measure))
        })
    }

    /// The MRTD of this launch.
    pub fn mrtd(&self, order: Order) -> [u8; 48] {
        let mut mrtd = Mrtd::new();
        for step in self.steps(order) {
            match step {
                Step::Add(page) => mrtd.page_add(page.gpa),
                Step::Measure(page) => mrtd.extend_page(page.gpa, page.contents),
            }
        }
        mrtd.value()
    }
}
