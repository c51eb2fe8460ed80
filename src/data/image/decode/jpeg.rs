//! JPEG by libjpeg-turbo's TurboJPEG interface (libjpeg-turbo.org, `turbojpeg.h`), built from source and linked statically.

use crate::data::image::pixels::{Pixel, Pixels, Region};
use anyhow::{Result, anyhow, ensure};
use std::cell::Cell;
use std::ffi::{CStr, c_int};
use turbojpeg_sys as tj;

/// A decompressor with its memory.
pub struct Jpeg {
    handle: tj::tjhandle,
    /// It has met a fault: TurboJPEG then may refuse what follows, so another takes its place.
    is_worn: Cell<bool>,
    height: usize,
    width: usize,
    /// Where in the file just opened the image's height stands, if that is known.
    height_at: Option<usize>,
    /// The file as if its image ended with the part that is wanted.
    lowered: Vec<u8>,
    /// TurboJPEG last read the header of that.
    knows_lowered: bool,
}

// SAFETY: the handle is a heap object that no other thread knows; TurboJPEG keeps no state per thread but an error text
// that is not used here.
unsafe impl Send for Jpeg {}

impl Drop for Jpeg {
    fn drop(&mut self) {
        // SAFETY: the handle came from tj3Init and is destroyed once.
        unsafe { tj::tj3Destroy(self.handle) }
    }
}

/// Scans of a progressive JPEG; real ones have about ten, a hostile file any number.
const MOST_SCANS: c_int = 100;
/// MB for the coefficients of a progressive JPEG: enough for the largest image that is read, without subsampling.
const MOST_MEMORY: c_int = 600;
/// Bytes of a copied file that are kept for the next one.
const KEPT: usize = 16 << 20;

impl Jpeg {
    pub fn new() -> Result<Jpeg> {
        let handle = init(tj::TJINIT_TJINIT_DECOMPRESS)?;
        set(handle, tj::TJPARAM_TJPARAM_SCANLIMIT, MOST_SCANS)?;
        set(handle, tj::TJPARAM_TJPARAM_MAXMEMORY, MOST_MEMORY)?;
        Ok(Jpeg {
            handle,
            is_worn: Cell::new(false),
            height: 0,
            width: 0,
            height_at: None,
            lowered: Vec::new(),
            knows_lowered: false,
        })
    }

    /// Reads the header: (height, width). A file without its end is refused, as by Pillow; other damage to the pixels' data
    /// is not, as there.
    pub fn open(&mut self, bytes: &[u8]) -> Result<(usize, usize)> {
        if self.is_worn.get() {
            *self = Jpeg::new()?;
        }
        // SAFETY: the handle is a decompressor, the pointer and length are a slice's.
        self.check(unsafe { tj::tj3DecompressHeader(self.handle, bytes.as_ptr(), bytes.len() as tj::size_t) })?;
        self.knows_lowered = false;
        (self.height, self.width) = (self.get(tj::TJPARAM_TJPARAM_JPEGHEIGHT), self.get(tj::TJPARAM_TJPARAM_JPEGWIDTH));
        let marks = marks(bytes);
        if let Some(Marks { scan, .. }) = marks {
            ensure!(bytes[scan..].windows(2).rev().any(|pair| pair == END), "not a whole JPEG: its end is missing");
        }
        let stands = |&at: &usize| bytes[at..at + 2] == (self.height as u16).to_be_bytes();
        self.height_at = marks.map(|marks| marks.height).filter(stands);
        Ok((self.height, self.width))
    }

    /// Decodes a region of the image just opened, and what must be around it, at a `shrunk`th of the size (1, 2, 4, 8).
    /// Returns where (left, top) the decoded part begins in the shrunken image.
    pub fn decode(&mut self, bytes: &[u8], region: Region, shrunk: usize, out: &mut Pixels) -> Result<(usize, usize)> {
        if std::mem::take(&mut self.knows_lowered) {
            // SAFETY: the handle is a decompressor, the pointer and length are a slice's.
            self.check(unsafe { tj::tj3DecompressHeader(self.handle, bytes.as_ptr(), bytes.len() as tj::size_t) })?;
        }
        let scaled = |length: usize| length.div_ceil(shrunk);
        let scaling = tj::tjscalingfactor { num: 1, denom: shrunk as c_int };
        // SAFETY: the handle is a decompressor.
        self.check(unsafe { tj::tj3SetScalingFactor(self.handle, scaling) })?;
        let (height, width) = (scaled(self.height), scaled(self.width));
        // The upsampling of chroma looks one pixel beyond: with a margin, the region's pixels are those of the whole.
        let right = (scaled(region.left + region.width) + MARGIN).min(width);
        let bottom = (scaled(region.top + region.height) + MARGIN).min(height);
        let left = (region.left / shrunk).saturating_sub(MARGIN) / self.unit(shrunk) * self.unit(shrunk);
        let top = (region.top / shrunk).saturating_sub(MARGIN);
        let known = self.get_signed(tj::TJPARAM_TJPARAM_SUBSAMP) >= 0;
        let (left, top, right, bottom) = if known { (left, top, right, bottom) } else { (0, 0, width, height) };
        let part = if (left, top, right, bottom) == (0, 0, width, height) {
            tj::tjregion { x: 0, y: 0, w: 0, h: 0 }
        } else {
            let (w, h) = ((right - left) as c_int, (bottom - top) as c_int);
            tj::tjregion { x: left as c_int, y: top as c_int, w, h }
        };
        // SAFETY: the handle is a decompressor.
        self.check(unsafe { tj::tj3SetCroppingRegion(self.handle, part) })?;
        out.resize(bottom - top, right - left);
        self.knows_lowered = self.lower(bytes, bottom * shrunk);
        let bytes = if self.knows_lowered { &self.lowered } else { bytes };
        let colours = self.get(tj::TJPARAM_TJPARAM_COLORSPACE) as tj::TJCS;
        let cmyk = [tj::TJCS_TJCS_CMYK, tj::TJCS_TJCS_YCCK].contains(&colours);
        let format = if cmyk { tj::TJPF_TJPF_CMYK } else { tj::TJPF_TJPF_RGBX };
        // SAFETY: `out` holds (bottom − top) rows of (right − left) pixels of four bytes, which is the region's size in
        // the shrunken image; pitch 0 means rows without gaps.
        self.check(unsafe {
            tj::tj3Decompress8(
                self.handle,
                bytes.as_ptr(),
                bytes.len() as tj::size_t,
                out.rgbx.as_mut_ptr().cast(),
                0,
                format,
            )
        })?;
        if cmyk {
            out.rgbx.iter_mut().for_each(|pixel| *pixel = rgb_of_inverted_cmyk(*pixel));
        }
        Ok((left, top))
    }

    /// Copies the file to `lowered` as if its image ended with row `bottom`, or with the coding units in which that lies: what
    /// is below is then not decoded, only passed over. False if there is nothing to be saved.
    fn lower(&mut self, bytes: &[u8], bottom: usize) -> bool {
        let heights = [8, 8, 16, 8, 16, 8, 32];
        let unit = heights.get(self.get(tj::TJPARAM_TJPARAM_SUBSAMP)).copied().unwrap_or(32);
        let height = bottom.next_multiple_of(unit);
        let Some(at) = self.height_at.filter(|_| height + unit <= self.height) else { return false };
        if self.lowered.capacity() > KEPT {
            self.lowered = Vec::new();
        }
        self.lowered.clear();
        self.lowered.extend_from_slice(bytes);
        self.lowered[at..at + 2].copy_from_slice(&(height as u16).to_be_bytes());
        true
    }

    /// Columns at which a decoded part may begin: multiples of the scaled coding unit's width.
    fn unit(&self, shrunk: usize) -> usize {
        let widths = [8, 16, 16, 8, 8, 32, 8];
        let subsampling = self.get(tj::TJPARAM_TJPARAM_SUBSAMP);
        (widths.get(subsampling).copied().unwrap_or(8) / shrunk).max(1)
    }

    fn get(&self, parameter: tj::TJPARAM) -> usize {
        self.get_signed(parameter).max(0) as usize
    }

    fn get_signed(&self, parameter: tj::TJPARAM) -> c_int {
        // SAFETY: the handle is live, and any number is a valid question.
        unsafe { tj::tj3Get(self.handle, parameter as c_int) }
    }

    /// Warnings are taken as Pillow takes them: the image is used. But for one: the file ended before the image did. After a
    /// warning TurboJPEG calls an error a warning too, so that the text must tell.
    fn check(&self, returned: c_int) -> Result<()> {
        if returned == 0 {
            return Ok(());
        }
        self.is_worn.set(true);
        // SAFETY: the handle is live.
        let warning = unsafe { tj::tj3GetErrorCode(self.handle) } as tj::TJERR == tj::TJERR_TJERR_WARNING;
        let text = error_text(self.handle);
        if warning && WARNINGS.iter().any(|warning| text.starts_with(warning)) {
            Ok(())
        } else {
            Err(anyhow!("not a whole JPEG: {text}"))
        }
    }
}

const MARGIN: usize = 2;

/// How libjpeg's warnings begin (`jerror.h`, JWRN), but for «Premature end of JPEG file».
const WARNINGS: [&str; 5] = [
    "Corrupt JPEG data:",
    "Inconsistent progression sequence",
    "Invalid SOS parameters",
    "Unknown Adobe color transform",
    "Warning: unknown JFIF revision",
];

/// The marker that ends a JPEG.
const END: [u8; 2] = [0xFF, 0xD9];

/// Places in a JPEG file.
#[derive(Clone, Copy)]
struct Marks {
    /// Of the image's height in the frame's header.
    height: usize,
    /// Of the first scan.
    scan: usize,
}

/// None if the file has no frame or no scan where they belong; libjpeg then says what is wrong.
fn marks(bytes: &[u8]) -> Option<Marks> {
    let (mut at, mut height) = (2, None);
    loop {
        at += bytes.get(at..)?.iter().position(|&byte| byte == 0xFF)?;
        at += bytes[at..].iter().position(|&byte| byte != 0xFF)?;
        let marker = bytes[at];
        at += 1;
        match marker {
            // No marker, or one without anything behind it.
            0x00 | 0x01 | 0xD0..=0xD8 => continue,
            0xD9 => return None,
            0xDA => return Some(Marks { height: height.filter(|&height| height + 2 <= at)?, scan: at }),
            // The frames; DHT, JPG and DAC are none.
            0xC0..=0xCF if ![0xC4, 0xC8, 0xCC].contains(&marker) => height = Some(at + 3),
            _ => {}
        }
        at += usize::from(u16::from_be_bytes(*bytes.get(at..)?.first_chunk()?));
    }
}

/// As Pillow's conversion (`Convert.c: cmyk2rgb`); a JPEG's CMYK is stored inverted, as Adobe does.
fn rgb_of_inverted_cmyk([c, m, y, k]: Pixel) -> Pixel {
    let ink = |inverted: u8| {
        let product = u32::from(255 - inverted) * u32::from(k) + 128;
        k.saturating_sub(((product + (product >> 8)) >> 8) as u8)
    };
    [ink(c), ink(m), ink(y), 255]
}

/// Compresses rows of RGB bytes (4:2:0, baseline).
///
/// # Errors
/// If the image has no pixels or is larger than JPEG can hold (65,500 on a side).
pub fn encode(rgb: &[u8], height: usize, width: usize, quality: u8) -> Result<Vec<u8>> {
    ensure!(rgb.len() == 3 * height * width, "{} bytes are not {height}×{width} RGB pixels", rgb.len());
    let handle = init(tj::TJINIT_TJINIT_COMPRESS)?;
    let encoded = compress(handle, rgb, height, width, quality);
    // SAFETY: the handle came from tj3Init and is destroyed once.
    unsafe { tj::tj3Destroy(handle) }
    encoded
}

fn compress(handle: tj::tjhandle, rgb: &[u8], height: usize, width: usize, quality: u8) -> Result<Vec<u8>> {
    set(handle, tj::TJPARAM_TJPARAM_QUALITY, quality.into())?;
    set(handle, tj::TJPARAM_TJPARAM_SUBSAMP, tj::TJSAMP_TJSAMP_420)?;
    let (mut buffer, mut size) = (std::ptr::null_mut(), 0);
    // SAFETY: the slice holds height · width pixels of three bytes; TurboJPEG allocates the buffer.
    let returned = unsafe {
        tj::tj3Compress8(
            handle,
            rgb.as_ptr(),
            width as c_int,
            0,
            height as c_int,
            tj::TJPF_TJPF_RGB,
            &mut buffer,
            &mut size,
        )
    };
    let result = if returned == 0 {
        // SAFETY: on success the buffer holds `size` bytes.
        Ok(unsafe { std::slice::from_raw_parts(buffer, size as usize) }.to_vec())
    } else {
        Err(anyhow!("cannot compress {width} × {height} pixels: {}", error_text(handle)))
    };
    // SAFETY: the buffer is TurboJPEG's own or null.
    unsafe { tj::tj3Free(buffer.cast()) }
    result
}

fn init(kind: tj::TJINIT) -> Result<tj::tjhandle> {
    // SAFETY: any number is a valid kind; null is an error.
    let handle = unsafe { tj::tj3Init(kind as c_int) };
    ensure!(!handle.is_null(), "TurboJPEG cannot start: out of memory");
    Ok(handle)
}

fn set(handle: tj::tjhandle, parameter: tj::TJPARAM, value: c_int) -> Result<()> {
    // SAFETY: the handle is live; TurboJPEG checks parameter and value.
    let returned = unsafe { tj::tj3Set(handle, parameter as c_int, value) };
    ensure!(returned == 0, "TurboJPEG: {}", error_text(handle));
    Ok(())
}

fn error_text(handle: tj::tjhandle) -> String {
    // SAFETY: the handle is live; the text is a C string that lives as long.
    unsafe { CStr::from_ptr(tj::tj3GetErrorStr(handle)) }.to_string_lossy().into_owned()
}
