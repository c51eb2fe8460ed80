//! The pixels of outlines.

use super::objects::Outline;
use anyhow::{Result, anyhow};
use hotcoco::mask::fr_polys;

/// The run lengths of an outline in an image of this height and width, as pycocotools rasterises polygons; empty if the outline is
/// not known.
pub fn runs_of(outline: &Outline, [height, width]: [usize; 2]) -> Result<Vec<u32>> {
    match outline {
        Outline::None => Ok(Vec::new()),
        Outline::Polygons(polygons) => {
            let code = fr_polys(polygons, height as u32, width as u32);
            Ok(code.map_err(|error| anyhow!("a polygon cannot be rasterised: {error}"))?.counts)
        }
        Outline::Runs(runs) => Ok(runs.clone()),
    }
}
