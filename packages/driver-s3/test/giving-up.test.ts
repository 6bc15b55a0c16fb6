import { S3Driver } from '@varve/driver-s3'
import { PatternBody } from '@varve/testkit'
import { expect, onTestFinished, test, vi } from 'vitest'
import { HttpHandler } from '../src/http-handler.ts'
import { FakeS3 } from './fake-s3.ts'

const MIB = 1024 * 1024

test.each(['WHEN_REQUIRED', 'WHEN_SUPPORTED'] as const)(
  'an upload that is given up between two of its requests ends with ABORTED alone: %s',
  async checksums => {
    await using fake = await FakeS3.start()
    const controller = new AbortController()
    const send = HttpHandler.prototype.handle
    const handle = vi.spyOn(HttpHandler.prototype, 'handle').mockImplementation(function (
      this: HttpHandler,
      request,
      options,
    ) {
      // all of the upload is prepared, and nothing of it is listened to
      if (request.query?.partNumber !== undefined) controller.abort()
      return send.call(this, request, options)
    })
    onTestFinished(() => handle.mockRestore())
    await using driver = new S3Driver({ ...fake.options, partSize: 5 * MIB, checksums })
    const upload = driver.put('a', new PatternBody({ size: 11 * MIB }), { signal: controller.signal })
    await expect(upload).rejects.toMatchObject({ code: 'ABORTED' })
    expect(fake.uploads.size).toBe(0)
    expect(fake.objects.size).toBe(0)
  },
)
