// Package bundle makes a support archive (`egret bundle`): Egret's records in etcd, the state of etcd, the faults that
// `egret status` finds, and, on a node, its kernel's state and what its daemons serve. It owns nothing, and changes
// nothing.
//
// Invariants:
//   - No secret gets in. Records are read into the types that Egret has for them and written from there, so that
//     nothing but the fields of these types passes; keys below the prefix that are none of Egret's are counted and not
//     read. No file of credentials is opened. What is left, free text such as errors, goes through one place, which
//     takes out private keys, and the password that etcd was asked with.
//   - Nothing in a record decides where something is written: names of files are constants and numbers.
//   - A part that fails, is cut, or takes too long is named in manifest.json with its error, and keeps no other part
//     from being there.
//   - Memory, size and time are bounded whatever etcd and the kernel hold: the command may run in the container of an
//     agent.
package bundle
