import { expect, test } from 'vitest'
import * as uploads from '../src/unfinished-uploads.ts'

const parseUploads = (json: string, folder: string) => uploads.parseUploads(json, folder, text => text)

const begun = '2026-02-03T04:05:06.789Z'
const printed = (...keys: string[]) =>
  JSON.stringify({ bucket: keys.map(Key => ({ Key, Initiated: begun, UploadId: 'x' })) })

test.each([
  ['', ['bucket/backups/a/b', 'bucket/backups2/c', 'bucket/top']],
  ['bucket', ['backups/a/b', 'backups2/c', 'top']],
  ['/bucket/backups', ['a/b']],
  ['backups', ['a/b']], // of a remote that begins in the bucket
  ['backups/a', ['b']],
  ['back', []],
])('of the uploads of a bucket, those below %j are taken', (folder, paths) => {
  const uploads = parseUploads(printed('backups/a/b', 'backups2/c', 'top'), folder)
  expect(uploads).toEqual(paths.map(path => ({ path, begunAt: new Date(begun) })))
})

test('no uploads are none', () => {
  expect(parseUploads('{\n\t"bucket": []\n}\n', 'bucket')).toEqual([])
})

test.each(['', 'null', '[1]', '{"bucket": 1}', '{"bucket": [{}]}', '{"bucket": [{"Key": "a"}]}'])(
  'what is no list of uploads is an error: %s',
  text => {
    expect(() => parseUploads(text, '')).toThrow(expect.objectContaining({ code: 'STORAGE_FAILED' }))
  },
)
