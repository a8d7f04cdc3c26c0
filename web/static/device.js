// @ts-check
/** A microphone or a camera from the browser. */

/**
 * @param {"audio" | "video"} kind
 * @param {string} device "" for the usual one, which is taken too where this one is not there any more
 * @param {MediaTrackConstraints} usual what else is wanted; `device` goes before its `facingMode`
 * @returns {Promise<MediaStream>} rejects as getUserMedia does
 */
export async function capture(kind, device, usual) {
  const use = (/** @type {MediaTrackConstraints} */ wanted) => navigator.mediaDevices.getUserMedia({ [kind]: wanted });
  if (!device) return use(usual);
  const { facingMode: _, ...rest } = usual;
  try {
    return await use({ ...rest, deviceId: { exact: device } }); // Chromium does not heed what is merely ideal
  } catch (error) {
    if (error instanceof Error && error.name !== "OverconstrainedError") throw error;
    return use(usual);
  }
}
