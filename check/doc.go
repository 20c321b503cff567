// Package check tells what Egret needs of a node's kernel and of its settings, what of it is there, and what it costs where it is not.
//
// What a kernel can do is tried in a network namespace that lives as long as the check. Where none can be made, as in a container that is not
// privileged, the features that an agent goes by are tried in a way that changes nothing, and it is said which are not. Settings, and other programs that use the
// numbers that are reserved for Egret, are read in the namespace of the calling thread. Nothing is written there.
package check
