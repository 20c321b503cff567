// Package tarball reads what egret bundle writes, for tests.
package tarball

import (
	"archive/tar"
	"compress/gzip"
	"errors"
	"io"
	"strings"
	"testing"
)

// Files returns the files of an archive, without the folder that all of them are in. look, if not nil, is called with
// the header of each.
func Files(t testing.TB, packed io.Reader, folder string, look func(*tar.Header)) map[string]string {
	t.Helper()
	plain, err := gzip.NewReader(packed)
	if err != nil {
		t.Fatal(err)
	}
	files := map[string]string{}
	for r := tar.NewReader(plain); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return files
		} else if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		if look != nil {
			look(h)
		}
		name := strings.TrimPrefix(h.Name, folder)
		if _, twice := files[name]; twice {
			t.Errorf("%s is there twice", name)
		}
		files[name] = string(b)
	}
}
