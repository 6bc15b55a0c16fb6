/** Prints whether the lab can run here. */
import { libvirtAvailable } from '../src/lab.ts'

console.log(JSON.stringify(await libvirtAvailable()))
