// SPDX-License-Identifier: Apache-2.0

package main

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"os"
	"path"
	"runtime/debug"
	"strings"
	"time"

	"github.com/CycloneDX/cyclonedx-go"
	"github.com/google/uuid"
	"github.com/package-url/packageurl-go"
)

// writeBOM writes a bill of materials in CycloneDX's format: what Go's linker recorded in
// Caddy, which is all that the image holds. Its serial number is not random, so that two
// builds are the same.
func writeBOM(to string, c caddy, what description) error {
	bom, err := bomOf(c, what)
	if err != nil {
		return err
	}
	file, err := os.Create(to)
	if err != nil {
		return err
	}
	err = cyclonedx.NewBOMEncoder(file, cyclonedx.BOMFileFormatJSON).SetPretty(true).Encode(bom)
	return errors.Join(err, file.Close())
}

func bomOf(c caddy, what description) (*cyclonedx.BOM, error) {
	program, err := os.ReadFile(c.path)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(program)
	digest := hex.EncodeToString(sum[:])
	bom := cyclonedx.NewBOM()
	bom.SerialNumber = uuid.NewSHA1(uuid.NameSpaceURL, []byte("https://"+pluginModule+"#"+what.version+" "+what.revision+" "+digest)).URN()
	bom.Metadata = &cyclonedx.Metadata{
		Timestamp: what.time.Format(time.RFC3339),
		Component: &cyclonedx.Component{
			BOMRef:  what.reference(),
			Type:    cyclonedx.ComponentTypeApplication,
			Name:    what.labels()["org.opencontainers.image.title"],
			Version: what.version,
			Hashes:  &[]cyclonedx.Hash{{Algorithm: cyclonedx.HashAlgoSHA256, Value: digest}},
			Properties: &[]cyclonedx.Property{
				{Name: "file", Value: "/usr/bin/caddy"},
				{Name: "GOOS", Value: "linux"},
				{Name: "GOARCH", Value: c.arch},
			},
		},
	}
	components := []cyclonedx.Component{component("std", strings.TrimPrefix(c.info.GoVersion, "go"))}
	for _, dep := range c.info.Deps {
		version := moduleVersion(c.info, dep.Path)
		if dep.Path == pluginModule && dep.Replace != nil {
			version = what.version // built from a working copy, whatever the flag says
		}
		components = append(components, component(dep.Path, version))
	}
	bom.Components = &components
	return bom, nil
}

func component(module, version string) cyclonedx.Component {
	namespace, name := path.Split(module)
	purl := packageurl.NewPackageURL(packageurl.TypeGolang, strings.TrimSuffix(namespace, "/"), name, version, nil, "").ToString()
	return cyclonedx.Component{BOMRef: purl, Type: cyclonedx.ComponentTypeLibrary, Name: module, Version: version, PackageURL: purl}
}

// moduleVersion returns the version of a module in a program.
func moduleVersion(info *debug.BuildInfo, module string) string {
	for _, dep := range info.Deps {
		if dep.Path != module {
			continue
		}
		if dep.Replace != nil && dep.Replace.Version != "" {
			return dep.Replace.Version
		}
		return dep.Version
	}
	return ""
}
