//! The devices that an image finds around it: those of every PC, or a Q35.

use kvm_ops::{Irqchip, Kind};
use kvm_ops_machine::{FileKind, Image, ImageFormat};

/// True for firmware that looks for a Q35, and starts a kernel that it finds there.
pub(crate) fn is_ovmf(image: &Image) -> bool {
    let kind = image.recognition().kind();
    image.format() == Some(ImageFormat::Firmware) && matches!(kind, FileKind::Ovmf | FileKind::Tdvf)
}

/// The image as its machine takes it, and whether that machine is a Q35. It is one for every confidential VM, for OVMF, and for a
/// kernel, which gets the tables that tell of it. An ELF file with the options of a kernel is one.
pub(crate) fn of(
    image: Image,
    kind: Kind,
    irqchip: Option<Irqchip>,
    has_kernel_options: bool,
) -> (Image, bool) {
    if matches!(kind, Kind::Of(tech) if tech.is_confidential()) {
        return (image, true);
    }
    let is_kernel = match image.format() {
        Some(ImageFormat::BzImage) => true,
        Some(ImageFormat::Elf) => has_kernel_options,
        Some(ImageFormat::Flat | ImageFormat::Firmware) | None => false,
    };
    // The tables tell of interrupt controllers in the platform.
    if is_kernel && matches!(irqchip, None | Some(Irqchip::Full)) {
        return (image.acpi(), true);
    }
    let is_q35 = is_ovmf(&image);
    (image, is_q35)
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_ops::Tech;

    fn image(format: ImageFormat) -> Image {
        Image::from_bytes("image", vec![0; 0x1000]).with_format(format)
    }

    #[test]
    fn kernels_with_all_interrupt_controllers_and_confidential_vms_have_a_q35() {
        let (vm, td) = (Kind::Normal, Kind::Of(Tech::Tdx));
        for (format, kind, irqchip, has_options, q35) in [
            (ImageFormat::BzImage, vm, None, false, true),
            (ImageFormat::BzImage, vm, Some(Irqchip::Full), true, true),
            (ImageFormat::BzImage, vm, Some(Irqchip::None), true, false),
            (ImageFormat::Elf, vm, None, true, true),
            (ImageFormat::Elf, vm, None, false, false),
            (ImageFormat::Elf, td, None, false, true),
            (ImageFormat::Firmware, vm, None, false, false),
            (ImageFormat::Firmware, td, None, false, true),
            (ImageFormat::Flat, vm, None, false, false),
        ] {
            let (_, is_q35) = of(image(format), kind, irqchip, has_options);
            assert_eq!(is_q35, q35, "{format:?} {kind} {irqchip:?}");
        }
    }
}
