import { writeFileSync } from 'node:fs'
import { manifestJsonSchema } from '../src/manifest.ts'

// Writes the JSON schema that the package ships; a test holds the two equal.
const file = new URL('../schema/manifest.v1.json', import.meta.url)
writeFileSync(file, `${JSON.stringify(manifestJsonSchema(), undefined, 2)}\n`)
