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

// image is what write makes an archive of.
type image struct {
	names      []string          // which containerd knows it by
	files      map[string]string // path in the image -> file of the machine
	links      map[string]string // path in the image -> what it leads to
	entrypoint []string
	path       string // PATH of its containers
}

// pauseArchive writes the archive of an OCI layout with pauseImage: the machine's busybox, static, and the programs
// that tests call by its name. Its entrypoint does nothing for ever, so that it is a pause image as well.
func pauseArchive(path string) error {
	busybox, err := findBusybox()
	if err != nil {
		return err
	}
	i := image{
		names: []string{pauseImage}, files: map[string]string{"bin/busybox": busybox}, links: map[string]string{},
		entrypoint: []string{"/bin/tail", "-f", "/dev/null"}, path: "/bin",
	}
	for _, name := range []string{"sh", "nc", "sleep", "tail"} {
		i.links["bin/"+name] = "busybox"
	}
	return i.write(path)
}

func findBusybox() (string, error) {
	path, err := exec.LookPath("busybox")
	if err != nil {
		return "", fmt.Errorf("looking for a program for the pods: %w: install busybox-static", err)
	}
	return path, nil
}

// layer returns the image's files as a tar archive.
func (i image) layer() ([]byte, error) {
	var layer bytes.Buffer
	w := tar.NewWriter(&layer)
	for _, name := range slices.Sorted(maps.Keys(i.files)) {
		b, err := os.ReadFile(i.files[name])
		if err != nil {
			return nil, err
		}
		if err := add(w, name, b, 0o755); err != nil {
			return nil, err
		}
	}
	for _, name := range slices.Sorted(maps.Keys(i.links)) {
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: i.links[name]}); err != nil {
			return nil, err
		}
	}
	err := w.Close()
	return layer.Bytes(), err
}

// write writes the image as the archive of an OCI layout.
func (i image) write(path string) error {
	layer, err := i.layer()
	if err != nil {
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
	content := blob(kind+"layer.v1.tar", layer)
	config := object(kind+"config.v1+json", map[string]any{
		"architecture": runtime.GOARCH, "os": "linux",
		"config": map[string]any{"Entrypoint": i.entrypoint, "Env": []string{"PATH=" + i.path}},
		"rootfs": map[string]any{"type": "layers", "diff_ids": []string{content.Digest}},
	})
	manifest := object(kind+"manifest.v1+json", map[string]any{
		"schemaVersion": 2, "mediaType": kind + "manifest.v1+json", "config": config, "layers": []descriptor{content},
	})
	var manifests []descriptor
	for _, name := range i.names {
		manifest.Annotations = map[string]string{"io.containerd.image.name": name}
		manifests = append(manifests, manifest)
	}
	index, err := json.Marshal(map[string]any{"schemaVersion": 2, "manifests": manifests})
	if err != nil {
		return err
	}

	var out bytes.Buffer
	w := tar.NewWriter(&out)
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
