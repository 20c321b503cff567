// Needcheck reads the files that tests wrote to EGRET_NEEDS, and fails when one was skipped and ran nowhere.
package main

import (
	"fmt"
	"io"
	"os"

	"github.com/egret-project/egret/internal/need"
)

func main() {
	if err := check(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func check(paths []string) error {
	var all []io.Reader
	for _, path := range paths {
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		all = append(all, f)
	}
	nowhere, err := need.Nowhere(io.MultiReader(all...))
	if err != nil {
		return err
	}
	for _, test := range nowhere {
		fmt.Fprintln(os.Stderr, "ran nowhere:", test)
	}
	if len(nowhere) > 0 {
		return fmt.Errorf("%d tests ran nowhere: run make test as root, and have their packages in integration/vm/test", len(nowhere))
	}
	return nil
}
