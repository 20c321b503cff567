package lab

import (
	"os"
	"path/filepath"
	"testing"
)

func TestACgroupThatWasRemovedByItsHierarchysOtherNameIsNoError(t *testing.T) {
	top := filepath.Join(t.TempDir(), "top")
	if err := os.MkdirAll(filepath.Join(top, "node-1", "kubepods"), 0o755); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := removeTree(top); err != nil {
			t.Errorf("removing %s: %v", top, err)
		}
	}
	if _, err := os.Stat(top); !os.IsNotExist(err) {
		t.Errorf("%s after its removal: got error %v, want that there is none", top, err)
	}
}
