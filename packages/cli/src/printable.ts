/**
 * Text without control characters but the line feed. Names and messages may come from a storage or from a
 * guest; they must not move the cursor of who reads them.
 */
export function printable(text: string): string {
  return text.replaceAll(/[^\P{Cc}\n]/gu, '\u{fffd}')
}
