import { expect, test } from 'vitest'
import { sftpError } from '../src/sftp-error.ts'

const status = (code: number, message: string) => Object.assign(new Error(message), { code })

test.each([
  [3, 'Permission denied', 'STORAGE_ACCESS_DENIED'],
  [4, 'Failure', 'STORAGE_FAILED'],
  [4, 'No space left on device', 'STORAGE_FULL'],
  [4, 'write: Disk quota exceeded', 'STORAGE_FULL'],
  [12, 'Write protect', 'STORAGE_ACCESS_DENIED'],
  [14, 'No space on filesystem', 'STORAGE_FULL'],
  [15, 'Quota exceeded', 'STORAGE_FULL'],
  [8, 'Operation unsupported', 'STORAGE_FAILED'],
])('status %i, %s, is %s', (code, message, expected) => {
  const error = sftpError(status(code, message), 'Writing', 'a/b')
  expect(error).toMatchObject({ name: 'VarveError', code: expected, context: { path: 'a/b', status: code } })
  expect(error.message).toContain(message)
})

test('an error that is explained already stays as it is', () => {
  const error = sftpError(status(3, 'Permission denied'), 'Writing', 'a/b')
  expect(sftpError(error, 'Reading', 'c')).toBe(error)
})

test.each([2, 3, 4, 5, 8, 14, 99])('status %i comes with what to do', code => {
  const { message } = sftpError(status(code, 'as told'), 'Writing', 'a/b')
  expect(message).toMatch(/Writing a\/b failed: as told\. [A-Z].{15,}\.$/)
})
