// Run by a test as a process of its own, which is allowed less: gives one file its name.
import { putInPlace } from '../src/put-in-place.ts'

await putInPlace(JSON.parse(process.argv[2] ?? ''))
