package lab

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"runtime"
	"slices"
)

// descriptor is that of the OCI image specification.
type descriptor struct {
	MediaType   string            `json:"mediaType"`
	Digest      string            `json:"digest"`
	Size        int               `json:"size"`
	Annotations map[string]string `json:"annotations,omitempty"`
}

// pauseArchive writes the archive of an OCI layout with pauseImage: the machine's busybox, static, and the programs
// that tests call by its name. Its entrypoint does nothing for ever, so that it is a pause image as well.
func pauseArchive(path string) error {
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		return fmt.Errorf("looking for a program for the pods: %w: install busybox-static", err)
	}
	program, err := os.ReadFile(busybox)
	if err != nil {
		return err
	}
	var layer bytes.Buffer
	w := tar.NewWriter(&layer)
	if err := add(w, "bin/busybox", program, 0o755); err != nil {
		return err
	}
	for _, name := range []string{"sh", "nc", "sleep", "tail"} {
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeSymlink, Name: "bin/" + name, Linkname: "busybox"}); err != nil {
			return err
		}
	}
	if err := w.Close(); err != nil {
		return err
	}

	blobs := map[string][]byte{}
	blob := func(mediaType string, b []byte) descriptor {
		sum := fmt.Sprintf("%x", sha256.Sum256(b))
		blobs[sum] = b
		return descriptor{MediaType: mediaType, Digest: "sha256:" + sum, Size: len(b)}
	}
	object := func(mediaType string, v any) descriptor {
		b, _ := json.Marshal(v) // maps, strings and descriptors always can be
		return blob(mediaType, b)
	}
	const kind = "application/vnd.oci.image."
	content := blob(kind+"layer.v1.tar", layer.Bytes())
	config := object(kind+"config.v1+json", map[string]any{
		"architecture": runtime.GOARCH, "os": "linux",
		"config": map[string]any{"Entrypoint": []string{"/bin/tail", "-f", "/dev/null"}, "Env": []string{"PATH=/bin"}},
		"rootfs": map[string]any{"type": "layers", "diff_ids": []string{content.Digest}},
	})
	manifest := object(kind+"manifest.v1+json", map[string]any{
		"schemaVersion": 2, "mediaType": kind + "manifest.v1+json", "config": config, "layers": []descriptor{content},
	})
	manifest.Annotations = map[string]string{"io.containerd.image.name": pauseImage}
	index, err := json.Marshal(map[string]any{"schemaVersion": 2, "manifests": []descriptor{manifest}})
	if err != nil {
		return err
	}

	var out bytes.Buffer
	w = tar.NewWriter(&out)
	files := map[string][]byte{"oci-layout": []byte(`{"imageLayoutVersion":"1.0.0"}`), "index.json": index}
	for sum, b := range blobs {
		files["blobs/sha256/"+sum] = b
	}
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if err := add(w, name, files[name], 0o644); err != nil {
			return err
		}
	}
	if err := w.Close(); err != nil {
		return err
	}
	return os.WriteFile(path, out.Bytes(), 0o600)
}

func add(w *tar.Writer, name string, b []byte, mode int64) error {
	if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Size: int64(len(b)), Mode: mode}); err != nil {
		return err
	}
	_, err := w.Write(b)
	return err
}
