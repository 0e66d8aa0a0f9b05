// SPDX-License-Identifier: Apache-2.0

module example.com/module

go 1.26
