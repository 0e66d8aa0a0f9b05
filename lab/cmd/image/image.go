// SPDX-License-Identifier: Apache-2.0

package main

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

const (
	imageName = "caddy-tailscale-impersonate"

	// layoutDir is the folder of the OCI layout within that of the result.
	layoutDir = "oci"

	// user is the numeric ID of the user and group that Caddy runs as. Kubernetes'
	// runAsNonRoot needs a number, and there is no user database.
	user = 65532

	// The versions of images that are no releases.
	standIn    = "stand-in"
	unreleased = "unreleased"

	// localRegistry comes before the name of an image where containerd imports it, as with
	// other programs that build images. Kubelet cannot run one whose name has no registry.
	localRegistry = "localhost/"

	// The annotation that the layout's version is in.
	refName = "org.opencontainers.image.ref.name"
)

// description is what an image says of itself.
type description struct {
	source
	version string
	caddy   string // the version of Caddy
	standIn bool
}

// describe says what an image with these Caddies is. One with the stand-in cannot be a
// release.
func describe(caddies []caddy, version string, src source) (description, error) {
	what := description{source: src, version: version}
	for i, c := range caddies {
		v := moduleVersion(c.info, caddyModule)
		if i > 0 && (c.standIn != what.standIn || v != what.caddy) {
			return description{}, fmt.Errorf("%s and %s are not the same Caddy", caddies[0].path, c.path)
		}
		what.standIn, what.caddy = c.standIn, v
		for _, dep := range c.info.Deps {
			if dep.Path == pluginModule && dep.Replace == nil && version != "" && dep.Version != version {
				return description{}, fmt.Errorf("%s has the plugin's %s; want %s", c.path, dep.Version, version)
			}
		}
	}
	switch {
	case what.standIn && version != "":
		return description{}, fmt.Errorf("this image has the lab's stand-in for caddy-tailscale, and cannot be %s: name a Caddy with -caddy", version)
	case what.standIn:
		what.version = standIn
	case version == "":
		what.version = unreleased
	}
	return what, nil
}

func (d description) reference() string { return imageName + ":" + d.version }

// file returns the name of a file that belongs to the image.
func (d description) file(suffix string) string {
	return imageName + "-" + d.version + "-" + suffix
}

func (d description) labels() map[string]string {
	title, text := imageName, "Caddy with tailscale_impersonate and caddy-tailscale: tailnet peers authenticate to a Kubernetes API server"
	if d.standIn {
		title += " (stand-in)"
		text = "Caddy with tailscale_impersonate and the lab's stand-in for caddy-tailscale: only for the project's own tests"
	}
	labels := map[string]string{
		"org.opencontainers.image.title":         title,
		"org.opencontainers.image.description":   text,
		"org.opencontainers.image.version":       d.version,
		"org.opencontainers.image.licenses":      "Apache-2.0",
		"org.opencontainers.image.url":           "https://" + pluginModule,
		"org.opencontainers.image.source":        "https://" + pluginModule,
		"org.opencontainers.image.documentation": "https://" + pluginModule + "/tree/main/docs",
		"org.opencontainers.image.created":       d.time.Format(time.RFC3339),
	}
	if d.revision != "" {
		labels["org.opencontainers.image.revision"] = d.revision
	}
	return labels
}

// config is that of xcaddy.Dockerfile.
func config(what description) v1.Config {
	return v1.Config{
		User:       fmt.Sprintf("%d:%d", user, user),
		WorkingDir: "/data",
		Env:        []string{"XDG_CONFIG_HOME=/data/config", "XDG_DATA_HOME=/data"},
		Volumes:    map[string]struct{}{"/data": {}},
		Entrypoint: []string{"/usr/bin/caddy"},
		Cmd:        []string{"run", "--config", "/etc/caddy/Caddyfile", "--adapter", "caddyfile"},
		Labels:     what.labels(),
	}
}

// assemble returns the image's index.
func assemble(caddies []caddy, what description) (v1.ImageIndex, error) {
	index := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for _, c := range caddies {
		image, err := imageOf(c, what)
		if err != nil {
			return nil, err
		}
		index = mutate.AppendManifests(index, mutate.IndexAddendum{
			Add:        image,
			Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: c.arch}},
		})
	}
	return mutate.Annotations(index, what.labels()).(v1.ImageIndex), nil
}

// imageOf returns the image of one architecture: a layer with an empty configuration
// folder, an empty data folder that belongs to the user, and Caddy.
func imageOf(c caddy, what description) (v1.Image, error) {
	program, err := os.ReadFile(c.path)
	if err != nil {
		return nil, err
	}
	var files bytes.Buffer
	w := tar.NewWriter(&files)
	for _, folder := range []struct {
		name  string
		owner int
	}{{"data/", user}, {"data/config/", user}, {"etc/", 0}, {"etc/caddy/", 0}, {"usr/", 0}, {"usr/bin/", 0}} {
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: folder.name, Mode: 0o755, Uid: folder.owner, Gid: folder.owner, ModTime: time.Unix(0, 0)}); err != nil {
			return nil, err
		}
	}
	if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "usr/bin/caddy", Mode: 0o755, Size: int64(len(program)), ModTime: time.Unix(0, 0)}); err != nil {
		return nil, err
	}
	_, writeErr := w.Write(program)
	if err := errors.Join(writeErr, w.Close()); err != nil {
		return nil, err
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(files.Bytes())), nil
	}, tarball.WithMediaType(types.OCILayer), tarball.WithCompressionLevel(6), tarball.WithCompressedCaching)
	if err != nil {
		return nil, err
	}
	base, err := mutate.ConfigFile(
		mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON),
		&v1.ConfigFile{OS: "linux", Architecture: c.arch, Created: v1.Time{Time: what.time}, Config: config(what), RootFS: v1.RootFS{Type: "layers"}},
	)
	if err != nil {
		return nil, err
	}
	return mutate.Append(base, mutate.Addendum{
		Layer:   layer,
		History: v1.History{Created: v1.Time{Time: what.time}, CreatedBy: "lab/cmd/image"},
	})
}

// write writes the image as an OCI layout, and a tar of that.
func write(dir string, index v1.ImageIndex, what description) error {
	oci, err := layout.Write(filepath.Join(dir, layoutDir), empty.Index)
	if err != nil {
		return err
	}
	// The first annotation is the specification's, the second names the image where
	// containerd imports it.
	if err := oci.AppendIndex(index, layout.WithAnnotations(map[string]string{
		refName:                    what.version,
		"io.containerd.image.name": localRegistry + what.reference(),
	})); err != nil {
		return err
	}
	file, err := os.Create(filepath.Join(dir, what.file("oci.tar")))
	if err != nil {
		return err
	}
	return errors.Join(archive(file, os.DirFS(filepath.Join(dir, layoutDir))), file.Close())
}

// archive writes a tar of a folder that depends on nothing but names and contents.
func archive(to io.Writer, from fs.FS) error {
	w := tar.NewWriter(to)
	err := fs.WalkDir(from, ".", func(path string, entry fs.DirEntry, err error) error {
		if err != nil || path == "." {
			return err
		}
		header := &tar.Header{Typeflag: tar.TypeDir, Name: path + "/", Mode: 0o755, ModTime: time.Unix(0, 0)}
		if entry.IsDir() {
			return w.WriteHeader(header)
		}
		content, err := fs.ReadFile(from, path)
		if err != nil {
			return err
		}
		header.Typeflag, header.Name, header.Mode, header.Size = tar.TypeReg, path, 0o644, int64(len(content))
		if err := w.WriteHeader(header); err != nil {
			return err
		}
		_, err = w.Write(content)
		return err
	})
	return errors.Join(err, w.Close())
}

// read returns the image in an OCI layout that this command wrote, and its version.
func read(dir string) (v1.ImageIndex, string, error) {
	outer, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		return nil, "", err
	}
	manifest, err := outer.IndexManifest()
	if err != nil {
		return nil, "", err
	}
	if len(manifest.Manifests) != 1 {
		return nil, "", fmt.Errorf("%s has %d images; want one", dir, len(manifest.Manifests))
	}
	index, err := outer.ImageIndex(manifest.Manifests[0].Digest)
	return index, manifest.Manifests[0].Annotations[refName], err
}

// sameFiles fails unless two folders have the same files.
func sameFiles(first, second string) error {
	count := 0
	for _, dirs := range [][2]string{{first, second}, {second, first}} {
		if err := fs.WalkDir(os.DirFS(dirs[0]), ".", func(path string, entry fs.DirEntry, err error) error {
			if err != nil || entry.IsDir() {
				return err
			}
			count++
			a, err := os.ReadFile(filepath.Join(dirs[0], path))
			if err != nil {
				return err
			}
			b, err := os.ReadFile(filepath.Join(dirs[1], path))
			if err != nil {
				return err
			}
			if !bytes.Equal(a, b) {
				return fmt.Errorf("%s differs", path)
			}
			return nil
		}); err != nil {
			return err
		}
	}
	if count == 0 {
		return fmt.Errorf("%s has no files", first)
	}
	return nil
}
