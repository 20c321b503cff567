// Package check reports what Egret needs of a node's kernel and of its settings, what of it is missing, and what does
// not work without it.
//
// What a kernel can do is tried in a network namespace that lives as long as the check. Where none can be made, as in a
// container that is not privileged, the features that an agent goes by are tried in a way that changes nothing, and it
// is said which are not. Settings, and other programs that use the numbers that are reserved for Egret, are read in the
// namespace of the calling thread. Nothing is written there.
package check
