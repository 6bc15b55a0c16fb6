/**
 * Tells a listener, whose own errors must break nothing: neither what it throws nor, where it is `async`, what it rejects
 * with, which would else end the process.
 */
export function tell<T>(listener: ((told: T) => void) | undefined, what: T): void {
  try {
    const returned: unknown = listener?.(what)
    Promise.resolve(returned).catch(() => undefined)
  } catch {
    // what a view throws is ignored
  }
}
