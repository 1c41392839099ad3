//! The measured start of a TD.

use kvm_ops::{EncParams, Gpa, InitialPageKind, TdParams};
use kvm_ops_machine::{LaunchPage, LaunchStep};
use kvm_ops_tdvf::{Attributes, Order, Section, SectionKind, Step, Tdvf, TdvfError, compose};

/// The parameters of a TD that runs an image. `allow_rbp` leaves out NO_RBP_MOD.
pub(crate) fn td_params(allow_rbp: bool) -> EncParams {
    EncParams::Td(Box::new(TdParams {
        no_rbp_mod: !allow_rbp,
        ..TdParams::default()
    }))
}

/// The pages of a TD's launch, and the MRTD that they must produce.
#[derive(Clone, Debug)]
pub(crate) struct TdImage {
    pages: Vec<LaunchPage>,
    steps: Vec<LaunchStep>,
    mrtd: [u8; 48],
}

impl TdImage {
    /// Parses a firmware image with TDVF metadata, to be launched in `order`.
    ///
    /// # Errors
    /// Invalid metadata.
    pub(crate) fn parse(image: &[u8], order: Order) -> Result<Self, TdvfError> {
        let tdvf = Tdvf::parse(image)?;
        let launch = tdvf.launch();
        let page = |page: kvm_ops_tdvf::PageAdd<'_>| LaunchPage {
            gpa: Gpa::new(page.gpa),
            contents: Box::new(*page.contents),
            kind: InitialPageKind::Unmeasured,
        };
        let step = |step: Step<'_>| match step {
            Step::Add(added) => LaunchStep::Add(page(added)),
            Step::Measure(added) => LaunchStep::Measure(Gpa::new(added.gpa)),
        };
        Ok(Self {
            pages: launch.pages().map(page).collect(),
            steps: launch.steps(order).map(step).collect(),
            mrtd: launch.mrtd(order),
        })
    }

    /// A small TD: four measured pages at the reset vector, and two for an early stack.
    pub(crate) fn built_in(order: Order) -> Self {
        // These bytes are never executed: the software platform runs guest programs. Each page
        // differs, so that swapped pages change MRTD.
        let mut image: Vec<u8> = (0..0x4000_u32).map(|i| (i / 16 % 251) as u8).collect();
        let sections = [
            Section {
                kind: SectionKind::Bfv,
                data_offset: 0,
                raw_size: 0x4000,
                memory_address: 0xffff_c000,
                memory_size: 0x4000,
                attributes: Attributes {
                    extend: true,
                    aug: false,
                },
            },
            Section {
                kind: SectionKind::TempMem,
                data_offset: 0,
                raw_size: 0,
                memory_address: 0x4000,
                memory_size: 0x2000,
                attributes: Attributes::default(),
            },
        ];
        compose(&mut image, &sections)
            .ok()
            .and_then(|()| Self::parse(&image, order).ok())
            .expect("the built-in image keeps the rules, as a test shows")
    }

    /// The pages in launch order.
    pub(crate) fn pages(&self) -> &[LaunchPage] {
        &self.pages
    }

    /// The launch steps, in order.
    pub(crate) fn steps(&self) -> &[LaunchStep] {
        &self.steps
    }

    /// The number of pages whose contents are measured.
    pub(crate) fn measured_pages(&self) -> usize {
        let measured = |step: &&LaunchStep| matches!(step, LaunchStep::Measure(_));
        self.steps.iter().filter(measured).count()
    }

    /// The MRTD, computed off line.
    pub(crate) const fn mrtd(&self) -> &[u8; 48] {
        &self.mrtd
    }

    /// The end of the highest page below the firmware's hole: the memory that the image needs.
    pub(crate) fn low_end(&self) -> u64 {
        let ends = self.pages.iter().map(|page| page.gpa.get() + 4096);
        ends.filter(|end| *end < 0xc000_0000).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_built_in_image_keeps_the_rules() {
        let image = TdImage::built_in(Order::TwoPass);
        assert_eq!((image.pages().len(), image.measured_pages()), (6, 4));
        assert_eq!(image.low_end(), 0x6000);
    }
}
