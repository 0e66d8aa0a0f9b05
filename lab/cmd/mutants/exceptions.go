// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"sigs.k8s.io/yaml"
)

// exception is a mutant that no test can or has to notice.
type exception struct {
	key
	Reason string `json:"reason"`
}

// yaml returns k as the list of exceptions has it, without its reason.
func (k key) yaml() string {
	quote := func(s string) string { return "'" + strings.ReplaceAll(s, "'", "''") + "'" }
	return fmt.Sprintf("- file: %s\n  in: %s\n  line: %s\n  change: %s\n  reason:\n", k.File, k.In, quote(k.Line), quote(k.Change))
}

// readExceptions reads the list of exceptions.
func readExceptions(path string) (map[key]string, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var list []exception
	if err := yaml.UnmarshalStrict(text, &list); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	reasons := make(map[key]string)
	for _, e := range list {
		if strings.TrimSpace(e.Reason) == "" {
			return nil, fmt.Errorf("%s: %s: %s: %s has no reason", path, e.File, e.In, e.Change)
		}
		if reasons[e.key] != "" {
			return nil, fmt.Errorf("%s: %s: %s: %s stands there twice", path, e.File, e.In, e.Change)
		}
		reasons[e.key] = e.Reason
	}
	return reasons, nil
}

// stale returns an error that names the exceptions for files that have been read and do not
// have such a mutant.
func stale(exceptions map[key]string, mutants []*mutant, files map[string]bool) error {
	have := make(map[key]bool)
	for _, m := range mutants {
		have[m.key] = true
	}
	var errs []error
	for k := range exceptions {
		if files[k.File] && !have[k] {
			errs = append(errs, fmt.Errorf("an exception stands for nothing; remove it: %s: %s: %s (%s)", k.File, k.In, k.Line, k.Change))
		}
	}
	return errors.Join(errs...)
}
