import { expect, test } from 'vitest'
import { assertVersion, parseVersion } from '../src/rclone-version.ts'

test.each([
  ['rclone v1.60.1-DEV\n- os/version: debian 12.11 (64 bit)\n', '1.60.1'],
  ['rclone v1.73.0\n', '1.73.0'],
  ['rclone v1.59\n', '1.59.0'],
  ['rclone v2.0.0-beta.1\n', '2.0.0'],
  ['GNU coreutils 9.1', undefined],
])('the version is read: %j', (text, version) => {
  expect(parseVersion(text)).toBe(version)
})

test.each(['1.59.0', '1.60.1', '1.100.0', '2.0.0'])('%s is new enough', version => {
  expect(() => assertVersion(version)).not.toThrow()
})

test.each(['1.58.9', '1.9.99', '0.70.0'])(
  '%s is too old: the error names it and the one that is needed',
  version => {
    expect(() => assertVersion(version)).toThrow(
      expect.objectContaining({
        code: 'INVALID_CONFIG',
        message: expect.stringMatching(new RegExp(`${version.replaceAll('.', '\\.')}.*1\\.59\\.0`)),
      }),
    )
  },
)

test('a program that is no rclone is refused', () => {
  expect(() => assertVersion(undefined)).toThrow(expect.objectContaining({ code: 'INVALID_CONFIG' }))
})
