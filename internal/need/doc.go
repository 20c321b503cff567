// Package need lets a test say what it needs of the machine and of its kernel. Nothing of it reaches a binary.
//
// A test that needs what is not there is skipped. Where EGRET_CI is set it fails instead, if every machine can have
// that: root, and the programs that `make kube` builds. A kernel's features it cannot choose: there the skip stands,
// and the test must run on another kernel, that of `make test-vm`. So every need writes a line into the file that
// EGRET_NEEDS names, "ran PACKAGE TEST" when the test comes to its end, "skipped PACKAGE TEST: WHY" when it does not
// begin; the command in needcheck fails when a test was skipped and ran nowhere.
package need
