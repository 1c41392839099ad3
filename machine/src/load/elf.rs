//! ELF images: a vmlinux, or any statically linked program without an operating system.

use elf::abi::{EM_386, EM_X86_64, ET_DYN, ET_EXEC, PT_LOAD};
use elf::endian::LittleEndian;
use elf::file::Class;
use elf::{ElfBytes, segment::ProgramHeader};

use super::super::layout::FOUR_GIB;
use super::{
    Gpa, GuestRam, Image, ImageFormat, MachineError, Start, bad, boot, clear_of_boot_area,
    low_range, parse,
};

/// An ELF image whose numbers have been checked.
pub(crate) struct Program<'a> {
    image: &'a Image,
    file: ElfBytes<'a, LittleEndian>,
    segments: Vec<ProgramHeader>,
    entry: Gpa,
    end: Gpa,
}

impl Program<'_> {
    pub(crate) fn is_64_bit(&self) -> bool {
        self.file.ehdr.class == Class::ELF64
    }

    /// The segments that are loaded.
    pub(crate) fn segments(&self) -> &[ProgramHeader] {
        &self.segments
    }

    pub(crate) const fn entry(&self) -> Gpa {
        self.entry
    }

    /// The bytes of a segment that are in the file.
    pub(crate) fn contents(&self, segment: &ProgramHeader) -> Result<&[u8], MachineError> {
        self.file
            .segment_data(segment)
            .map_err(|error| parse(ImageFormat::Elf, self.image, error))
    }
}

/// Checks the image against the memory. `place` refuses a segment for its place, from its start to its end.
pub(crate) fn open<'a>(
    image: &'a Image,
    ram: &GuestRam,
    place: impl Fn(Gpa, Gpa) -> Result<(), MachineError>,
) -> Result<Program<'a>, MachineError> {
    let file = ElfBytes::<LittleEndian>::minimal_parse(&image.bytes)
        .map_err(|error| parse(ImageFormat::Elf, image, error))?;
    let header = &file.ehdr;
    if ![ET_EXEC, ET_DYN].contains(&header.e_type) {
        return Err(bad(
            ImageFormat::Elf,
            image,
            "the type of file (e_type)",
            header.e_type,
        ));
    }
    let machine = match header.class {
        Class::ELF32 => EM_386,
        Class::ELF64 => EM_X86_64,
    };
    if header.e_machine != machine {
        return Err(bad(
            ImageFormat::Elf,
            image,
            "the machine (e_machine)",
            header.e_machine,
        ));
    }
    let segments: Vec<ProgramHeader> = file
        .segments()
        .into_iter()
        .flat_map(|segments| segments.iter())
        .filter(|segment| segment.p_type == PT_LOAD)
        .collect();
    let mut end = Gpa::new(0);
    for segment in &segments {
        let segment_end = check(image, ram, segment)?;
        place(Gpa::new(segment.p_paddr), segment_end)?;
        end = end.max(segment_end);
    }
    let entry = image.entry.unwrap_or(Gpa::new(header.e_entry));
    if !segments.iter().any(|segment| contains(segment, entry)) {
        return Err(MachineError::EntryOutside {
            name: image.name.clone(),
            entry,
        });
    }
    Ok(Program {
        image,
        file,
        segments,
        entry,
        end,
    })
}

pub(crate) fn load(image: &Image, ram: &GuestRam) -> Result<Start, MachineError> {
    let place = |start, end| clear_of_boot_area(image, "a segment", start, end);
    let program = open(image, ram, place)?;
    for segment in program.segments() {
        ram.write(Gpa::new(segment.p_paddr), program.contents(segment)?)?;
        // What the file leaves out is zero, also in memory that is not new.
        ram.clear(
            Gpa::new(segment.p_paddr + segment.p_filesz),
            segment.p_memsz - segment.p_filesz,
        )?;
    }
    boot::kernel(image, ram, program.end)?;
    match program.is_64_bit() {
        true => boot::long(ram, program.entry),
        false => boot::protected(ram, program.entry),
    }
}

/// Checks one segment's numbers, and returns where it ends in memory.
fn check(image: &Image, ram: &GuestRam, segment: &ProgramHeader) -> Result<Gpa, MachineError> {
    let in_file = segment.p_offset.checked_add(segment.p_filesz);
    if in_file.is_none_or(|end| end > image.len() as u64) {
        return Err(bad(
            ImageFormat::Elf,
            image,
            "the size of a segment in the file (p_filesz)",
            segment.p_filesz,
        ));
    }
    if segment.p_filesz > segment.p_memsz {
        return Err(bad(
            ImageFormat::Elf,
            image,
            "the size of a segment in memory (p_memsz)",
            segment.p_memsz,
        ));
    }
    let start = Gpa::new(segment.p_paddr);
    low_range(image, ram, start, segment.p_memsz)
}

/// True if the entry lies in the segment, and below 4 GiB, which the start maps.
fn contains(segment: &ProgramHeader, entry: Gpa) -> bool {
    entry.get() < FOUR_GIB
        && entry
            .get()
            .checked_sub(segment.p_paddr)
            .is_some_and(|offset| offset < segment.p_memsz)
}
