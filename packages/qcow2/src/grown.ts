/** `array` with room for twice as many elements; what it holds is kept. */
export function grown<T extends Float64Array | Int32Array | Uint8Array | Uint32Array>(array: T): T {
  const larger = new (array.constructor as new (length: number) => T)(Math.max(16, array.length * 2))
  larger.set(array)
  return larger
}
